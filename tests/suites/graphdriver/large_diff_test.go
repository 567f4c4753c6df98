package suite

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/graphtest"
)

// Times the diff of a large layer in which little has changed, with cold caches.
//
//	LARGE_DIFF       file that gets {"operation": [nanoseconds, ...]}
//	LARGE_DIFF_FILES how many files the parent has, each of 52 KiB (default 20000: 1 GiB)
//	LARGE_DIFF_RUNS  how often it is measured (default 3)
func TestLargeDiff(t *testing.T) {
	target := os.Getenv("LARGE_DIFF")
	if target == "" {
		t.Skip("LARGE_DIFF names no file")
	}
	driver := graphtest.GetDriver(t, name(), opts()...)
	defer graphtest.PutDriver(t)
	files := count("LARGE_DIFF_FILES", 20000)
	must(t, driver.Create("large", "", nil))
	must(t, many(driver, "large", files))
	must(t, driver.CreateReadWrite("large-child", "large", nil))
	changed := map[string][]byte{}
	for i := 0; i < 10; i++ {
		changed[place(i*files/10)] = []byte(fmt.Sprintf("changed %d", i))
	}
	must(t, fill(driver, "large-child", changed))
	found := timings{}
	for i := 0; i < count("LARGE_DIFF_RUNS", 3); i++ {
		must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
		found.time(t, "diff of 1 GiB, ten files changed, cold", func() error { return drain(driver) })
		found.time(t, "diff of 1 GiB, ten files changed, warm", func() error { return drain(driver) })
	}
	changes, err := driver.Changes("large-child", "large")
	must(t, err)
	modified := 0
	for _, change := range changes {
		if _, is := changed[change.Path[1:]]; is {
			modified++
		}
	}
	if modified != len(changed) {
		t.Fatalf("%d of %d changed files are listed: %v", modified, len(changed), changes)
	}
	must(t, driver.Remove("large-child"))
	must(t, driver.Remove("large"))
	raw, err := json.Marshal(found)
	must(t, err)
	must(t, os.WriteFile(target, raw, 0o600))
}

func drain(driver graphdriver.Driver) error {
	stream, err := driver.Diff("large-child", "large")
	if err != nil {
		return err
	}
	defer stream.Close()
	_, err = io.Copy(io.Discard, stream)
	return err
}

func place(number int) string {
	return fmt.Sprintf("directory-%d/file-%d", number/100, number)
}

func many(driver graphdriver.Driver, id string, files int) error {
	root, err := driver.Get(id, "")
	if err != nil {
		return err
	}
	content := make([]byte, 52*1024)
	for i := range content {
		content[i] = byte(i)
	}
	for i := 0; i < files; i++ {
		path := filepath.Join(root.Path(), place(i))
		if i%100 == 0 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return driver.Put(id)
}
