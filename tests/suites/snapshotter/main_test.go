// Runs containerd's own snapshotter test suite (Debian's packaged source) against a snapshotter served over gRPC.
//
//	SNAPSHOTTER_CMD   shell command that serves the snapshotter; {root} and {sock} are replaced. Started once per case.
//	SNAPSHOTTER_SOCK  instead of a command: a socket that is already served
//	SNAPSHOTTER_NAME  name sent in each request (default devmapper)
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/defaults"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

func connect(sock string) (*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	return grpc.DialContext(ctx, dialer.DialAddress(sock),
		grpc.WithBlock(),
		grpc.WithInsecure(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.2, MaxDelay: time.Second}}),
		grpc.WithContextDialer(dialer.ContextDialer),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
}

func name() string {
	if n := os.Getenv("SNAPSHOTTER_NAME"); n != "" {
		return n
	}
	return "devmapper"
}

func factory() testsuite.SnapshotterFunc {
	name, n := name(), int64(0) // the case's number names its socket
	return func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		if sock := os.Getenv("SNAPSHOTTER_SOCK"); sock != "" {
			conn, err := connect(sock)
			if err != nil {
				return nil, nil, err
			}
			return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), conn.Close, nil
		}
		sock := filepath.Join(os.TempDir(), fmt.Sprintf("snap-%d-%d.sock", os.Getpid(), atomic.AddInt64(&n, 1)))
		os.Remove(sock)
		line := strings.NewReplacer("{root}", root, "{sock}", sock).Replace(os.Getenv("SNAPSHOTTER_CMD"))
		cmd := exec.Command("sh", "-c", "exec "+line)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			return nil, nil, err
		}
		conn, err := connect(sock)
		if err != nil {
			cmd.Process.Kill()
			return nil, nil, err
		}
		stop := func() error {
			conn.Close()
			cmd.Process.Signal(syscall.SIGTERM)
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }()
			select {
			case err := <-done:
				if err != nil {
					return fmt.Errorf("the server: %w", err)
				}
				return nil
			case <-time.After(30 * time.Second):
				cmd.Process.Kill()
				return fmt.Errorf("the server did not stop within 30 s of SIGTERM")
			}
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), stop, nil
	}
}

func TestSnapshotter(t *testing.T) { testsuite.SnapshotterSuite(t, name(), factory()) }

// base returns a served snapshotter that holds one committed snapshot, "base".
func base(b *testing.B) (context.Context, snapshots.Snapshotter) {
	ctx := namespaces.WithNamespace(context.Background(), "bench")
	sn, stop, err := factory()(ctx, b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stop() })
	key := fmt.Sprintf("base-%d", time.Now().UnixNano())
	must(b, prepare(ctx, sn, key+"-active", ""))
	must(b, sn.Commit(ctx, "base", key+"-active", keep))
	b.Cleanup(func() { sn.Remove(ctx, "base") })
	return ctx, sn
}

// keep tells containerd's garbage collector, where there is one, to leave the snapshot alone.
var keep = snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "bench"})

func prepare(ctx context.Context, sn snapshots.Snapshotter, key, parent string) error {
	_, err := sn.Prepare(ctx, key, parent, keep)
	return err
}

func must(b *testing.B, err error) {
	if err != nil {
		b.Fatal(err)
	}
}

// One writable snapshot of a committed one, made and removed: what a container costs.
func BenchmarkPrepareRemove(b *testing.B) {
	ctx, sn := base(b)
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		key := fmt.Sprintf("k%d", i)
		must(b, prepare(ctx, sn, key, "base"))
		must(b, sn.Remove(ctx, key))
	}
}

// One more layer on a chain: what a layer of an image costs without its content.
func BenchmarkPrepareCommit(b *testing.B) {
	ctx, sn := base(b)
	parent := "base"
	var made []string
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		key, done := fmt.Sprintf("a%d", i), fmt.Sprintf("c%d", i)
		must(b, prepare(ctx, sn, key, parent))
		must(b, sn.Commit(ctx, done, key, keep))
		parent, made = done, append(made, done)
	}
	b.StopTimer()
	for i := len(made) - 1; i >= 0; i-- {
		must(b, sn.Remove(ctx, made[i]))
	}
}

func BenchmarkStat(b *testing.B) {
	ctx, sn := base(b)
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		_, err := sn.Stat(ctx, "base")
		must(b, err)
	}
}
