package suite

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/graphtest"
)

// Times single operations: tools/bench_docker.py does the same ones with our driver.
//
//	TIMINGS        file that gets {"operation": [nanoseconds, ...]}
//	TIMINGS_LAYERS how many layers are made, mounted, unmounted and removed (default 20)
//	TIMINGS_CHAINS how many chains of 64 layers (default 1)
func TestTimings(t *testing.T) {
	target := os.Getenv("TIMINGS")
	if target == "" {
		t.Skip("TIMINGS names no file")
	}
	driver := graphtest.GetDriver(t, name(), opts()...)
	defer graphtest.PutDriver(t)
	found := timings{}
	layers(t, driver, found, count("TIMINGS_LAYERS", 20))
	for i := 0; i < count("TIMINGS_CHAINS", 1); i++ {
		chain(t, driver, found, i)
	}
	raw, err := json.Marshal(found)
	must(t, err)
	must(t, os.WriteFile(target, raw, 0o600))
}

type timings map[string][]int64

func (found timings) time(t *testing.T, operation string, do func() error) int64 {
	begin := time.Now()
	err := do()
	taken := time.Since(begin).Nanoseconds()
	must(t, err)
	found[operation] = append(found[operation], taken)
	return taken
}

// layers times each operation on layers above one that holds some files.
func layers(t *testing.T, driver graphdriver.Driver, found timings, layers int) {
	must(t, driver.Create("timed-parent", "", nil))
	write(t, driver, "timed-parent", "file", make([]byte, 16384))
	for i := 0; i < layers; i++ {
		id := fmt.Sprintf("timed-%d", i)
		sum := found.time(t, "create", func() error { return driver.Create(id, "timed-parent", nil) })
		sum += found.time(t, "get", func() error { _, err := driver.Get(id, ""); return err })
		sum += found.time(t, "put", func() error { return driver.Put(id) })
		sum += found.time(t, "remove", func() error { return driver.Remove(id) })
		found["create + get + put + remove"] = append(found["create + get + put + remove"], sum)
	}
	for i := 0; i < layers; i++ {
		found.time(t, "get + put", func() error {
			if _, err := driver.Get("timed-parent", ""); err != nil {
				return err
			}
			return driver.Put("timed-parent")
		})
	}
}

// chain times 64 layers, each on the one before, with three files written to each and all read at the top.
func chain(t *testing.T, driver graphdriver.Driver, found timings, number int) {
	const depth = 64
	id := func(i int) string { return fmt.Sprintf("chain-%d-%d", number, i) }
	must(t, driver.Create(id(0), "", nil))
	found.time(t, "64 layers, written and read", func() error {
		for i := 1; i <= depth; i++ {
			if err := driver.Create(id(i), id(i-1), nil); err != nil {
				return err
			}
			files := map[string][]byte{
				"top-id":                         []byte(id(i)),
				fmt.Sprintf("layer-%d/id", i):     []byte(id(i)),
				fmt.Sprintf("layer-%d/parent", i): []byte(id(i - 1)),
			}
			if err := fill(driver, id(i), files); err != nil {
				return err
			}
		}
		root, err := driver.Get(id(depth), "")
		if err != nil {
			return err
		}
		defer driver.Put(id(depth))
		for i := depth; i > 0; i-- {
			raw, err := os.ReadFile(filepath.Join(root.Path(), fmt.Sprintf("layer-%d", i), "parent"))
			if err != nil {
				return err
			}
			if string(raw) != id(i-1) {
				return fmt.Errorf("layer %d has %q", i, raw)
			}
		}
		return nil
	})
}

func write(t *testing.T, driver graphdriver.Driver, id, path string, content []byte) {
	must(t, fill(driver, id, map[string][]byte{path: content}))
}

func fill(driver graphdriver.Driver, id string, files map[string][]byte) error {
	root, err := driver.Get(id, "")
	if err != nil {
		return err
	}
	for path, content := range files {
		path = filepath.Join(root.Path(), path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return driver.Put(id)
}

func count(variable string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return n
	}
	return otherwise
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
