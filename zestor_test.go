package zestor_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/zestor-dev/zestor"
)

// The stores table drives every test of what the stores have in common.

type user struct {
	Name, Email, City string
	Age               int
}

var kinds = []string{"memory", "sqlite", "sqlite-private", "sqlite-rollback"}

// open makes an empty store of a kind, which ends with the test.
func open[T any](t testing.TB, kind string, opts zestor.StoreOptions[T]) zestor.Store[T] {
	t.Helper()
	if kind == "memory" {
		s := zestor.NewMemStore(opts)
		t.Cleanup(func() { check(t, s.Close()) })
		return s
	}
	o := zestor.SQLiteOptions[T]{StoreOptions: opts, DSN: ":memory:", DisableWAL: kind == "sqlite-rollback"}
	if kind != "sqlite-private" {
		o.DSN = filepath.Join(t.TempDir(), "test.db")
	}
	return openSQLite(t, o)
}

func openSQLite[T any](t testing.TB, o zestor.SQLiteOptions[T]) zestor.Store[T] {
	t.Helper()
	s, err := zestor.NewSQLiteStore(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

// each runs f on every kind of store.
func each[T any](t *testing.T, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	eachWith(t, zestor.StoreOptions[T]{}, f)
}

func eachWith[T any](t *testing.T, opts zestor.StoreOptions[T], f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) { f(t, open(t, kind, opts)) })
	}
}

// eachBubble runs f on every kind of store in a synctest bubble, where
// synctest.Wait returns when every goroutine of the store sleeps.
func eachBubble[T any](t *testing.T, f func(t *testing.T, s zestor.Store[T])) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, open(t, kind, zestor.StoreOptions[T]{})) })
		})
	}
}

// check fails the test for an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// long says that the long versions of the tests are wanted.
var long = os.Getenv("ZESTOR_LONG") != ""

// missing skips a test whose tool the machine lacks; in CI that fails.
func missing(t testing.TB, tool string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing", tool)
	}
	t.Skipf("%s is missing", tool)
}

// Other processes are this test binary, started again as a child.

var children = map[string]func(args []string){}

// child registers what a child process does.
func child(name string, run func(args []string)) bool {
	children[name] = run
	return true
}

func TestMain(m *testing.M) {
	if name := os.Getenv("ZESTOR_CHILD"); name != "" {
		children[name](os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// process is a running child: lines it prints can be read from out, and it
// reads what is written to in.
type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// start runs a child. It is killed when the test ends.
func start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "ZESTOR_CHILD="+name)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	p := &process{cmd, in, bufio.NewScanner(out)}
	p.out.Buffer(nil, 1<<20)
	return p
}

// line returns the next line that the child prints.
func (p *process) line(t testing.TB) string {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("child ended: %v", p.out.Err())
	}
	return p.out.Text()
}

// must is for children and examples, which have no test to fail.
func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
