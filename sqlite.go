package zestor

import (
	"bytes"
	"cmp"
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	sqlite3 "github.com/mattn/go-sqlite3"
)

// The schema. Triggers fill the log in the transaction of the change, so that whoever writes, it is
// complete. They also number the changes: a write that comes with the next revision is the store's
// own and is only logged; to any other they give its version, revision and time.
//
// Files hold createTable and createLog byte for byte: to change one takes a schemaVersion and an upgrade.
//
// The newest row of the log can't be deleted: it is where the store's revision is kept. position
// counts the bytes logged before a row, so that to cut the log to a size takes no adding up.
const (
	schemaVersion = 1
	schemaObjects = 7 // in createLog
	tableColumns  = "kind:1 key:2 value:0 version:0 updated_at:0 revision:0"
	oldColumns    = "kind:1 key:2 value:0 version:0 updated_at:0" // of the multi-package Zestor

	createTable = `CREATE TABLE zestor_kv (
		kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
		version INTEGER NOT NULL DEFAULT 1,
		updated_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
		revision INTEGER NOT NULL DEFAULT 0,
		PRIMARY KEY (kind, key)) WITHOUT ROWID;`

	lastRevision = `(SELECT max(revision) FROM zestor_log)`
	logEnd       = `ifnull((SELECT position + length(CAST(kind || key AS BLOB)) + length(value) + 64
			FROM zestor_log ORDER BY revision DESC LIMIT 1), 0)`
	nextVersion = `max(CAST(OLD.version AS INTEGER), 1) + 1`
	noChange    = `NEW.revision <= OLD.revision AND CAST(NEW.value AS BLOB) IS CAST(OLD.value AS BLOB)`
	// The version that is due follows. A row that has it, and the revision, is left alone: no kind is NULL.
	repair = `, revision = last_insert_rowid(), updated_at = strftime('%Y-%m-%dT%H:%M:%fZ','now')
			WHERE key = NEW.key AND kind = iif(NEW.revision = last_insert_rowid() AND NEW.version = `

	createLog = `
	CREATE TABLE zestor_log (
		revision INTEGER PRIMARY KEY, position INTEGER NOT NULL, type TEXT NOT NULL,
		version INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL);
	CREATE TRIGGER zestor_insert AFTER INSERT ON zestor_kv BEGIN
		SELECT RAISE(ABORT, 'zestor: kind and key must be non-empty text')
			WHERE NOT (NEW.kind > '' AND NEW.kind < x'' AND NEW.key > '' AND NEW.key < x'');
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'create', 1, NEW.kind, NEW.key, CAST(NEW.value AS BLOB));
		UPDATE zestor_kv SET version = 1` + repair + `1, NULL, NEW.kind);
	END;
	CREATE TRIGGER zestor_update AFTER UPDATE OF value ON zestor_kv WHEN NOT (` + noChange + `) BEGIN
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'update', ` + nextVersion + `, NEW.kind, NEW.key, CAST(NEW.value AS BLOB));
		UPDATE zestor_kv SET version = ` + nextVersion + repair + nextVersion + `, NULL, NEW.kind);
	END;
	CREATE TRIGGER zestor_same AFTER UPDATE OF value ON zestor_kv WHEN ` + noChange + ` BEGIN
		UPDATE zestor_kv SET version = OLD.version, revision = OLD.revision, updated_at = OLD.updated_at
			WHERE kind = NEW.kind AND key = NEW.key;
	END;
	CREATE TRIGGER zestor_delete AFTER DELETE ON zestor_kv BEGIN
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'delete', OLD.version, OLD.kind, OLD.key, CAST(OLD.value AS BLOB));
	END;
	CREATE TRIGGER zestor_rename BEFORE UPDATE OF kind, key ON zestor_kv
	WHEN NEW.kind IS NOT OLD.kind OR NEW.key IS NOT OLD.key BEGIN
		SELECT RAISE(ABORT, 'zestor: kind and key cannot be updated: delete and insert');
	END;
	CREATE TRIGGER zestor_keep BEFORE DELETE ON zestor_log WHEN OLD.revision = ` + lastRevision + ` BEGIN
		SELECT RAISE(IGNORE);
	END;
	PRAGMA user_version = 1`

	// With OR ROLLBACK, and without functions, SQLite need not keep in memory how to undo the UPDATE.
	// After an ANALYZE of a short table SQLite has to be told which index to use. The last row marks
	// where the history begins. It is no change, so it can't be replayed.
	upgradeTable = `
	ALTER TABLE zestor_kv ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
	UPDATE OR ROLLBACK zestor_kv INDEXED BY sqlite_autoindex_zestor_kv_1
		SET revision = number, version = CASE WHEN CAST(version AS INTEGER) < 1 THEN 1
			WHEN CAST(version AS INTEGER) > 1 << 62 THEN 1 << 62 ELSE CAST(version AS INTEGER) END FROM
		(SELECT kind AS k, key AS y, row_number() OVER (ORDER BY kind, key) AS number FROM zestor_kv)
		WHERE kind = k AND key = y;
	DROP INDEX IF EXISTS idx_kv_kind;` + createLog + `;
	INSERT INTO zestor_log SELECT n, 0, 'upgrade', 0, '', '', x'' FROM (SELECT count(*) AS n FROM zestor_kv) WHERE n > 0`
)

const (
	maxCopy      = 16 << 20              // the driver keeps a copy of arguments: after longer ones a connection is closed
	readers      = 4                     // connections for short reads; more starve the writer on a small machine
	pollInterval = 14 * time.Millisecond // at which, on average, a watched store looks for the commits of other processes
	groupBytes   = 1 << 20               // ends a shared transaction, and a statement of many rows
	maxWAL       = 12 << 20              // see restartWAL

	// SQLite backs off to 100 ms between tries for a lock, and so may never find a busy file free.
	// It gets this little time, and is asked again until BusyTimeout is over.
	lockPoll = 10 * time.Millisecond
)

// SQLiteOptions are the options of a SQLite store. DSN is required. Negative numbers are errors.
type SQLiteOptions[T any] struct {
	StoreOptions[T]
	DSN          string        // where the data is, see NewSQLiteStore
	Codec        Codec         // nil: JSON
	BusyTimeout  time.Duration // how long a call waits for another store's lock; 0: what the DSN says, or 5 s
	DisableWAL   bool          // a new file gets SQLite's rollback journal; an existing one keeps its mode
	HistoryBytes int64         // how much of the newest changes the file keeps for watchers; 0: 16 MiB
}

// NewSQLiteStore opens the store in a SQLite file, and makes one of an absent or empty file. A file
// of the multi-package Zestor is upgraded. Any other, and one that a newer Zestor wrote, is refused
// with an error that names it, and left as it is.
//
// The DSN is a path, taken literally, without a ?; or a URI "file:path?parameters" with %-escapes; or
// ":memory:" for a private store that ends with Close. The parameters are mode (ro, rw, rwc), immutable,
// _synchronous or _sync (SQLite's levels; FULL if absent), and _busy_timeout or _timeout in
// milliseconds; cache is ignored; any other is an error. With mode=ro the file must be a Zestor
// file of this version, and a write that would change it fails. To read a file in WAL mode, SQLite must
// find its -wal and -shm or be able to make them, or be told with immutable=1 that nobody changes the
// file; then it is opened read-only, and changes that are still in a -wal beside it are not seen.
//
// Without DisableWAL a file that is not in WAL mode is switched to it if possible, which it is not
// while others use the file.
//
// HistoryBytes counts kinds, keys, values, and 64 bytes a change; when it is full, a sixteenth of it
// is freed. The newest change is always kept; with different limits on one file the smallest wins, step
// by step as its store writes. The file does not shrink.
//
// Several processes, and several stores of different types that keep to their own kinds, may have
// one file open. So that they find it free, a store that has locked it for longer than 20 ms waits before
// its next write, for an eighth of that time and at most 0.1 s. Calls of one store wait for each other
// without a limit. The package must be built with cgo.
func NewSQLiteStore[T any](opts SQLiteOptions[T]) (Store[T], error) {
	codec := cmp.Or[Codec](opts.Codec, JSON{})
	e := &sqliteEngine{mode: "rwc", busyTimeout: opts.BusyTimeout, historyBytes: cmp.Or(opts.HistoryBytes, 16<<20),
		slots: make(chan struct{}, readers), turn: make(chan struct{}, 1),
		waiting: make(chan *request, 64), wake: make(chan struct{}, 1)}
	if err := e.open(opts.DSN, opts.DisableWAL); err != nil {
		return nil, place{"open"}.fail(fmt.Errorf("%s: %w", opts.DSN, err))
	}
	return newStore(&core[T, []byte]{engine: e, options: opts.StoreOptions, equal: bytes.Equal, encode: encoder[T](codec),
		decode: decoder[T](codec), streams: e.wal, hub: &hub[T, []byte]{wake: e.wake}}), nil
}

// sqliteEngine is a SQLite file. Locks are taken in this order: turn or slots, gate, then mu.
type sqliteEngine struct {
	path         string // absolute, since the program may change its directory; "" is ":memory:"
	uri          string // for the driver, but for the mode
	mode         string
	busyTimeout  time.Duration
	historyBytes int64
	wal          bool          // else readers and writers wait for each other, at gate
	durable      bool          // each write waits for fsync
	file         os.FileInfo   // what the path named when it was opened
	slots        chan struct{} // holds a token for each short read under way
	turn         chan struct{} // holds a token while somebody writes
	waiting      chan *request // writes that may share a transaction
	wake         chan struct{} // holds a token after a commit, for tail
	gate         sync.RWMutex  // without WAL, locked to write and read-locked to read; locked for all in ":memory:"

	mu   sync.Mutex
	idle []*conn // protected by mu; in ":memory:" the only connection, which is the data

	// Only for whose turn it is.
	locked time.Time // when the last transaction failed because of a lock; zero: it did not
	looked time.Time // when the last write asked moved
	free   time.Time // when the next write may begin
	room   int64     // what may go into the WAL before restartWAL looks how long it is
	page   int64     // the size of a page, once it has looked
}

func (s *sqliteEngine) open(text string, disableWAL bool) (err error) {
	if s.busyTimeout < 0 || s.historyBytes < 0 {
		return fmt.Errorf("negative option: BusyTimeout is %v, HistoryBytes %d", s.busyTimeout, s.historyBytes)
	}
	if err = s.parse(text); err != nil {
		return err
	}
	if file, err := os.Stat(s.path); err == nil && !file.Mode().IsRegular() {
		return errors.New("not a regular file") // opening a FIFO might never return
	} else if err == nil && (file.Size() == 1 || file.Size() == 0 && s.mode == "ro") {
		return fmt.Errorf("not a database: it has %d bytes", file.Size()) // SQLite takes both for empty, and removes a WAL beside
	} else if err != nil && s.mode != "rwc" && s.path != "" {
		return err
	} else if dir, _ := filepath.Split(s.path); err != nil && dir != "" {
		if _, err = os.Stat(dir); err != nil {
			return err // SQLite would make dir/file of dir/file/ and of dir/none/../file
		}
	}
	c, err := s.connect()
	if err != nil {
		return err
	}
	s.idle = []*conn{c}
	if s.file, err = os.Stat(s.path); err == nil || s.path == "" {
		err = c.retry(func() error { return c.transaction("BEGIN", c.upgrade) }) // anew if another process was faster
	}
	mode := "PRAGMA journal_mode = WAL"
	if disableWAL || s.mode == "ro" {
		mode = "PRAGMA journal_mode"
	}
	c.busyTimeout = min(c.busyTimeout, time.Second)         // a switch is not worth more
	s.wal = err == nil && as[string](c.exec(mode)) == "wal" // a file in use, or that can't have a WAL, keeps its mode
	s.mode = strings.TrimSuffix(s.mode, "c")                // the file is there now, and not to be made again
	if err != nil {
		// Closing last, c would take into the file what a crash left in a WAL; one that only reads does not.
		file, _ := filepath.EvalSymlinks(s.path)
		if wal, err := os.Stat(file + "-wal"); err == nil && wal.Size() > 0 {
			s.mode = "ro"
			if last, err := s.connect(); err == nil { // it keeps the WAL, since the driver has read the file
				defer last.Close()
			}
		}
		c.Close()
	}
	return err
}

func (s *sqliteEngine) parse(text string) (err error) {
	u := &url.URL{Path: text}
	if strings.HasPrefix(text, "file:") {
		if u, err = url.Parse(text); err != nil {
			return err
		}
		if u.Opaque != "" {
			u.Path, err = url.PathUnescape(u.Opaque)
		}
	} else if name, params, ok := strings.Cut(text, "?"); ok {
		err = fmt.Errorf("a path with a ? is ambiguous: write file:%s?%s for parameters, or file:%s for that very name",
			(&url.URL{Path: name}).EscapedPath(), params, u.EscapedPath())
	}
	params, bad := url.ParseQuery(u.RawQuery)
	err = cmp.Or(err, bad)
	synchronous, immutable, wait := "FULL", false, uint64(5000)
	for _, name := range slices.Sorted(maps.Keys(params)) { // so that of two names for one thing the same wins each time
		value, ok, bad := params[name][len(params[name])-1], true, error(nil) // of two values the last
		switch name {
		case "mode":
			s.mode, ok = value, value == "ro" || value == "rw" || value == "rwc"
		case "immutable":
			immutable, bad = strconv.ParseBool(value)
		case "_synchronous", "_sync":
			synchronous = strings.ToUpper(value)
			ok = slices.Contains([]string{"0", "OFF", "1", "NORMAL", "2", "FULL", "3", "EXTRA"}, synchronous)
		case "_busy_timeout", "_timeout":
			wait, bad = strconv.ParseUint(value, 10, 31)
		case "cache": // shared, it would only bring "table is locked"
		default:
			return fmt.Errorf("unknown parameter %q", name)
		}
		if !ok || bad != nil {
			return fmt.Errorf("parameter %s can't be %q", name, value)
		}
	}
	if immutable {
		s.mode = "ro"
	}
	s.durable = !slices.Contains([]string{"0", "OFF", "1", "NORMAL"}, synchronous)
	s.busyTimeout = cmp.Or(s.busyTimeout, time.Duration(wait)*time.Millisecond)
	switch {
	case err != nil || u.Path == ":memory:":
	case u.User != nil || u.Host != "" && u.Host != "localhost":
		err = fmt.Errorf("a file: URI can't name the host %q, nor a user", u.Host)
	case u.Path == "":
		err = errors.New(`DSN required: a path, a file: URI or ":memory:"`)
	case strings.Contains(u.Path, "\x00"):
		err = errors.New("a NUL byte in the path")
	case filepath.IsAbs(u.Path):
		s.path = u.Path
	case filepath.VolumeName(strings.TrimPrefix(u.Path, "/")) != "": // file:///C:/..., on Windows
		s.path = strings.TrimPrefix(u.Path, "/")
	default: // filepath.Abs would take .. for the parent, where it may follow a link
		s.path, err = os.Getwd()
		s.path += string(filepath.Separator) + u.Path
	}
	s.uri = ":memory:"
	if s.path != "" {
		path := strings.TrimPrefix(filepath.ToSlash(s.path), "/") // C:/... has none
		s.uri = "file:///" + (&url.URL{Path: path}).EscapedPath()
	}
	// A connection has one user at a time: SQLite needs no mutex.
	s.uri += fmt.Sprintf("?_mutex=no&_stmt_cache_size=64&_synchronous=%s&_busy_timeout=%d&immutable=%t&mode=",
		synchronous, lockPoll.Milliseconds(), immutable)
	return err
}

// upgrade gives the file this schema, if it does not have it, or says why it can't.
func (c *conn) upgrade() error {
	columns, known, objects := "", 0, 0
	for v := range c.rows(`SELECT sql || ';' FROM sqlite_schema WHERE name NOT GLOB 'sqlite_*'`) {
		objects++
		if sql := as[string](v[0]); sql == createTable {
			columns = tableColumns // most files need no closer look, for which SQLite takes its time
		} else if strings.Contains(createLog, sql) {
			known++
		}
	}
	if columns == "" {
		columns = as[string](c.exec(`SELECT group_concat(name || ':' || pk, ' ') FROM pragma_table_xinfo('zestor_kv')`))
	}
	version := as[int64](c.exec(`PRAGMA user_version`))
	script := ""
	switch {
	case columns == "" && objects > 0:
		return errors.New("not a Zestor file: it has tables, but no zestor_kv")
	case version > schemaVersion:
		return fmt.Errorf("written by a newer Zestor: its schema has version %d, this program knows %d", version, schemaVersion)
	case version == schemaVersion && known == schemaObjects && columns == tableColumns:
		return nil
	case version == 0 && known == schemaObjects && columns == tableColumns:
		script = `PRAGMA user_version = 1` // the shell's .dump leaves it out
	case version == 0 && columns == "":
		script = createTable + createLog
	case version == 0 && columns == oldColumns && known == 0:
		script = upgradeTable
	default:
		return fmt.Errorf("not a Zestor file: version %d, %d of %d other objects, and a table zestor_kv with the columns %q",
			version, known, schemaObjects, columns)
	}
	if encoding := as[string](c.exec(`PRAGMA encoding`)); encoding != "UTF-8" {
		return fmt.Errorf("not a Zestor file: its text is encoded as %s", encoding)
	}
	if c.engine.mode == "ro" {
		return errors.New("not a Zestor file of this version: it would have to be made or upgraded, and is opened read-only")
	}
	_, err := c.Conn.(driver.ExecerContext).ExecContext(context.Background(), script, nil)
	return err
}

// conn is a connection, and the state of its transaction or snapshot, for one goroutine at a time.
type conn struct {
	driver.Conn
	engine          *sqliteEngine
	busyTimeout     time.Duration // what is left of it
	args            []driver.NamedValue
	reading         []driver.Rows // what is not read to its end yet
	discard         bool          // it must not be lent again
	err             error         // SQLite's first since the connection was borrowed; nothing is run after it
	changes, logged int64         // in this transaction: rows, and bytes
}

func (s *sqliteEngine) connect() (*conn, error) {
	c := &conn{engine: s, busyTimeout: s.busyTimeout}
	return c, c.retry(func() (err error) {
		if c.Conn, err = new(sqlite3.SQLiteDriver).Open(s.uri + s.mode); err == nil {
			c.exec(`PRAGMA temp_store = MEMORY`) // what a statement needs to be undone; there may be no directory for files
		}
		return err
	})
}

// moved fails if the path names another file than at first: nobody would find what is written.
func (s *sqliteEngine) moved() error {
	file, err := os.Stat(s.path)
	if s.path == "" || os.SameFile(file, s.file) {
		return nil
	}
	return fmt.Errorf("the file was removed, replaced or made unreachable while it was open: %w", cmp.Or(err, errors.New(s.path)))
}

var errLocked = errors.New("the file stayed locked for longer than BusyTimeout")

// retry repeats what another connection's lock makes fail, SQLITE_BUSY or SQLITE_PROTOCOL. Where SQLite
// can only read, it also repeats what fails while another rolls back, which looks like a crash to mend.
func (c *conn) retry(fn func() error) error {
	for tries := 0; ; tries++ {
		start, left := time.Now(), c.busyTimeout
		err := fn() // may retry too, and take from busyTimeout itself
		rollback := readOnly(err) && tries < 3 && left > lockPoll
		if err == nil || !rollback && err.Error() != "database is locked" && err.Error() != "locking protocol" {
			return err
		}
		time.Sleep(lockPoll / 10) // for some locks SQLite does not wait at all
		if c.busyTimeout = left - time.Since(start); c.busyTimeout <= 0 && !rollback {
			return fmt.Errorf("%w: %w", errLocked, err)
		}
	}
}

// readOnly says that SQLite can only read. The driver's type for errors does not exist without cgo.
func readOnly(err error) bool {
	return err != nil && err.Error() == "attempt to write a readonly database"
}

// rows runs a statement, which the driver keeps prepared, and yields its rows; c.err says
// afterwards whether those were all. The slice is reused, its values are not.
func (c *conn) rows(sql string, args ...driver.Value) iter.Seq[[]driver.Value] {
	return func(yield func([]driver.Value) bool) {
		if c.err != nil {
			return
		}
		c.args = c.args[:0]
		for i, arg := range args {
			c.args = append(c.args, driver.NamedValue{Ordinal: i + 1, Value: arg})
			c.discard = c.discard || len(as[[]byte](arg))+len(as[string](arg)) > maxCopy
		}
		var rows driver.Rows
		c.err = c.retry(func() (err error) {
			rows, err = c.Conn.(driver.QueryerContext).QueryContext(context.Background(), sql, c.args)
			return err
		})
		clear(c.args)
		if c.err != nil {
			return
		}
		c.reading = append(c.reading, rows)
		defer func() {
			rows.Close()
			c.reading = slices.DeleteFunc(c.reading, func(other driver.Rows) bool { return other == rows })
		}()
		row := make([]driver.Value, len(rows.Columns()))
		for c.err == nil {
			if c.err = rows.Next(row); c.err == nil && !yield(row) {
				return
			}
		}
		if c.err == io.EOF { // all is well
			c.err = nil
		}
	}
}

// exec runs a statement and returns the first column of its first row, or nil.
func (c *conn) exec(sql string, args ...driver.Value) driver.Value {
	for row := range c.rows(sql, args...) {
		return row[0]
	}
	return nil
}

// transaction commits if fn returns nil.
func (c *conn) transaction(begin string, fn func() error) error {
	c.err = nil // of an earlier try
	if c.exec(begin); c.err != nil {
		return c.err
	}
	defer func() { // also after a panic or Goexit
		if !c.Conn.(interface{ AutoCommit() bool }).AutoCommit() {
			_, err := c.Conn.(driver.ExecerContext).ExecContext(context.Background(), "ROLLBACK", nil)
			c.discard = c.discard || err != nil
		}
	}()
	err := fn()
	if err == nil {
		c.exec("COMMIT")
	}
	return cmp.Or(c.err, err)
}

// as returns v, or a zero T: a damaged or hand-made file may hold other types than the schema says.
func as[T any](v driver.Value) T { t, _ := v.(T); return t }

// borrow lends fn a connection, and without WAL the gate. Only whose turn it is may write.
func (s *sqliteEngine) borrow(write bool, fn func(*conn) error) (err error) {
	if !s.wal {
		gate := s.gate.RLocker()
		if write || s.path == "" {
			gate = &s.gate
		}
		gate.Lock()
		defer gate.Unlock()
	}
	var c *conn
	s.mu.Lock()
	if n := len(s.idle); n > 0 {
		c, s.idle = s.idle[n-1], s.idle[:n-1]
	}
	s.mu.Unlock()
	if c == nil {
		if err = s.moved(); err == nil { // else SQLite would take the old file's WAL for the new one's
			c, err = s.connect()
			err = s.at(err)
		}
		if err != nil {
			return err
		}
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		// A connection made while the file can't be written only ever reads. After other errors it is kept:
		// when the last one closes, a commit that failed to sync may be left in the WAL, to be recovered.
		if s.path == "" || len(s.idle) <= readers && len(c.reading) == 0 && !c.discard && !readOnly(c.err) {
			s.idle = append(s.idle, c)
			return
		}
		for _, rows := range c.reading { // of iterators that outlive their View, and find out when they go on
			rows.Close()
		}
		c.Close()
	}()
	c.err, c.busyTimeout, c.changes, c.logged = nil, s.busyTimeout, 0, 0
	err = fn(c)
	if !s.wal && s.path != "" && c.changes == 0 && err == nil {
		err = s.moved() // if so, SQLite may have read what a failed commit left
	}
	return cmp.Or(s.at(c.err), err)
}

// at adds to an error of SQLite which file it is about.
func (s *sqliteEngine) at(err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", cmp.Or(s.path, ":memory:"), err)
	}
	return err
}

// read takes a slot unless it lasts: other reads may begin inside, and would wait for its slot for ever.
func (s *sqliteEngine) read(lasts bool, fn func(snapshot[[]byte]) error) error {
	if !lasts {
		s.slots <- struct{}{}
		defer func() { <-s.slots }()
		return s.borrow(false, func(c *conn) error { return fn(c) })
	}
	return s.borrow(false, func(c *conn) error {
		return c.transaction("BEGIN", func() error { return fn(c) })
	})
}

// The columns of an entry, or of its value alone.
const (
	valueColumn  = `CAST(value AS BLOB)`
	entryColumns = valueColumn + `, version, revision, updated_at`
)

func entryOf(kind, key string, v []driver.Value) Entry[[]byte] {
	e := Entry[[]byte]{Kind: kind, Key: key, Value: as[[]byte](v[0])}
	if len(v) > 1 {
		e.Version, e.Revision = max(1, as[int64](v[1])), as[int64](v[2])
		at, _ := time.Parse(time.RFC3339Nano, as[string](v[3])) // zero if that is no time
		e.UpdatedAt = at.UTC().Truncate(time.Millisecond)
	}
	return e
}

func (c *conn) get(kind, key string, whole bool) (e Entry[[]byte]) {
	sql := `SELECT ` + valueColumn + ` FROM zestor_kv WHERE kind = ? AND key = ?`
	if whole {
		sql = `SELECT ` + entryColumns + ` FROM zestor_kv WHERE kind = ? AND key = ?`
	}
	for v := range c.rows(sql, kind, key) {
		return entryOf(kind, key, v)
	}
	return e
}

func (c *conn) scan(kind string, r Range, whole bool, each func(Entry[[]byte]) bool) {
	columns, order := valueColumn, `key`
	if whole {
		columns = entryColumns
	}
	if r.Descending {
		order = `key DESC`
	}
	lo, hi := r.bounds()
	args := []driver.Value{kind, lo, hi, int64(cmp.Or(r.Limit, -1))}
	// An empty hi becomes a blob, which SQLite sorts behind every text. The kind is known, so NULL will do.
	sql := `SELECT NULL, key, ` + columns + ` FROM zestor_kv
		WHERE kind = ? AND key >= ? AND key < ifnull(nullif(?, ''), x'') ORDER BY ` + order + ` LIMIT ?`
	if kind == "" {
		sql, args = `SELECT kind, key, `+columns+` FROM zestor_kv`, nil
	}
	for v := range c.rows(sql, args...) {
		if !each(entryOf(cmp.Or(kind, as[string](v[0])), as[string](v[1]), v[2:])) {
			break
		}
	}
}

func (c *conn) keys(kind string) []string {
	keys := []string{}
	for v := range c.rows(`SELECT key FROM zestor_kv WHERE kind = ? ORDER BY key`, kind) {
		keys = append(keys, as[string](v[0]))
	}
	return keys
}

func (c *conn) count(kind string) int {
	return int(as[int64](c.exec(`SELECT count(*) FROM zestor_kv WHERE kind = ?`, kind)))
}

func (c *conn) revision() int64 { return as[int64](c.exec(`SELECT max(revision) FROM zestor_log`)) }

func (c *conn) failure() error { return c.engine.at(c.err) }

func (c *conn) history(since int64, each func(*Event[[]byte]) bool) error {
	// After an ANALYZE of a short log SQLite reads all of it to find a range: so few are found one by one.
	where, newest := `revision > ? ORDER BY revision`, c.revision()
	switch {
	case newest < since: // somebody has restored an older state
		return ErrCompacted
	case newest-since <= 64:
		where = `revision = ? + 1`
	}
	for since < newest {
		before := since
		for v := range c.rows(`SELECT type, kind, key, value, version, revision FROM zestor_log WHERE `+where, since) {
			ev := &Event[[]byte]{EventType(as[string](v[0])), as[string](v[1]), as[string](v[2]), as[[]byte](v[3]),
				max(1, as[int64](v[4])), as[int64](v[5]), nil}
			if since++; ev.Revision != since || ev.Type == "upgrade" {
				return ErrCompacted
			}
			if !each(ev) {
				return nil
			}
		}
		if since == before {
			return ErrCompacted // but c.err, if that is why, comes first
		}
	}
	return c.engine.moved() // if so, changes go to another file
}

const orUpdate = ` ON CONFLICT (kind, key) DO UPDATE SET
	value = excluded.value, version = version + 1, updated_at = excluded.updated_at, revision = excluded.revision`

func (c *conn) put(kind, key string, value []byte) {
	c.exec(`INSERT INTO zestor_kv (kind, key, value, updated_at, revision) VALUES (?, ?, ?, ?, ifnull(1 + `+lastRevision+`, 1))`+
		orUpdate, kind, key, value, now())
	c.wrote(1, len(kind)+len(key)+len(value))
}

// putMany puts what is not there already. SQLite compares, in half the time; but it refuses even a
// write of nothing to a file that it can only read, for which it returns false.
func (c *conn) putMany(entries []Entry[[]byte]) bool {
	for len(entries) > 0 && c.err == nil { // so that a c.err below is of this statement
		revision := c.revision()
		args, size, n := []driver.Value{entries[0].Kind, now()}, 0, 0
		for ; n < min(32, len(entries)) && size < groupBytes; n++ { // the connection keeps a statement for each number of rows
			e := entries[n]
			args = append(args, e.Key, e.Value, revision+1+int64(n))
			size += len(e.Kind) + len(e.Key) + len(e.Value)
		}
		// A bare ? has the number after the highest before it: ?3, 4, 5, then 6, 7, 8 ...
		c.exec(`INSERT INTO zestor_kv (kind, key, value, updated_at, revision) VALUES (?1, ?3, ?, ?2, ?)`+
			strings.Repeat(`, (?1, ?, ?, ?2, ?)`, n-1)+orUpdate+` WHERE CAST(value AS BLOB) IS NOT excluded.value`, args...)
		if readOnly(c.err) {
			c.err = nil
			return false
		}
		c.wrote(c.revision()-revision, size) // equal values took none, and a trigger has put the others right
		entries = entries[n:]
	}
	return true
}

func now() string { return time.Now().UTC().Format("2006-01-02T15:04:05.000Z") }

func (c *conn) remove(old Entry[[]byte]) {
	c.exec(`DELETE FROM zestor_kv WHERE kind = ? AND key = ?`, old.Kind, old.Key)
	c.wrote(1, len(old.Kind)+len(old.Key)+len(old.Value))
}

// wrote counts changes, and what a trigger has logged of them.
func (c *conn) wrote(changes int64, bytes int) {
	if c.changes += changes; changes > 0 {
		c.logged += int64(bytes) + 64*changes
	}
}

// A request is a write that may share a transaction with others.
type request struct {
	fn      func(*conn) error
	arrived time.Time
	err     error
	done    chan struct{} // closed after the commit
}

// write waits for its turn. Shared writes are group commit: whose turn it is does the work of all.
func (s *sqliteEngine) write(shared bool, fn func(transaction[[]byte]) error) error {
	r := &request{fn: func(c *conn) error { return fn(c) }, arrived: time.Now()}
	if !shared {
		s.turn <- struct{}{}
		defer func() { <-s.turn }()
		return s.transact(r.arrived, r.fn)
	}
	r.done = make(chan struct{})
	s.waiting <- r
	for {
		select {
		case <-r.done:
			return r.err
		case s.turn <- struct{}{}:
			s.group()
			<-s.turn
		}
	}
}

// group commits waiting requests in one transaction. An error of the commit is everybody's. One of
// a request itself is only its own: if SQLite refuses a statement, each gets its own transaction,
// and also if the file was locked for longer than one of them waits.
func (s *sqliteEngine) group() {
	if len(s.waiting) == 0 {
		return // somebody else did it all
	}
	group, done := []*request{<-s.waiting}, false // nobody else receives
	err := s.transact(group[0].arrived, func(c *conn) error {
		for i := 0; i < len(group); i++ { // which grows
			group[i].err = group[i].fn(c)
			if len(s.waiting) > 0 && c.err == nil && c.logged <= groupBytes {
				group = append(group, <-s.waiting)
			}
		}
		done = c.err == nil
		return c.err
	})
	alone := len(group) > 1 && (!done || errors.Is(err, errLocked))
	for _, r := range group {
		if r.err = cmp.Or(err, r.err); alone {
			r.err = s.transact(r.arrived, r.fn)
		}
		close(r.done)
	}
}

// transact is the one way to write, in turn. If another's lock made the write before fail, what this one
// has waited until then counts against its BusyTimeout: who queues for a locked file fails together.
func (s *sqliteEngine) transact(arrived time.Time, fn func(*conn) error) error {
	time.Sleep(min(time.Until(s.free), 10*lockPoll))          // a synctest bubble has its own clock
	if s.durable || time.Since(s.looked) > time.Millisecond { // a look takes 6 % of a write without fsync
		if err := s.moved(); err != nil {
			return err // the next write looks again
		}
		s.looked = time.Now()
	}
	return s.borrow(true, func(c *conn) error {
		if c.busyTimeout -= max(0, s.locked.Sub(arrived)); c.busyTimeout < 0 {
			c.err = errLocked
			return c.err
		}
		var begun time.Time
		defer func() { // also after a panic or Goexit
			// Others look for the lock each few milliseconds, and with SQLite's own wait soon each 100 only: of
			// long writes one after the other they would not find the end.
			if held := time.Since(begun); !begun.IsZero() && held > 2*lockPoll && s.path != "" && s.mode != "ro" {
				s.free = time.Now().Add(min(held/8, 10*lockPoll))
			}
		}()
		err := c.transaction("BEGIN IMMEDIATE", func() error { // in a read-only file this begins a read
			begun = time.Now()
			err := fn(c)
			if err == nil && c.changes > 0 {
				s.trim(c)
			}
			return err
		})
		s.locked = time.Time{}
		if errors.Is(c.err, errLocked) {
			s.locked = time.Now()
		}
		if err == nil && c.changes > 0 {
			try(s.wake, struct{}{})
			s.restartWAL(c)
		}
		return err
	})
}

// trim cuts the log to the newest changes that fit historyBytes; and a little more, so that most
// writes find nothing to do; but never many more rows, nor beside the first many more bytes, than
// the transaction has written.
func (s *sqliteEngine) trim(c *conn) {
	size := c.exec(`SELECT ` + logEnd + ` - position FROM zestor_log ORDER BY revision LIMIT 1`)
	if as[int64](size) > s.historyBytes {
		first := c.exec(`SELECT revision FROM zestor_log WHERE position >= `+logEnd+` - ?
			OR revision >= min(`+lastRevision+`, ? + (SELECT min(revision) FROM zestor_log))
			OR position > ? + (SELECT position FROM zestor_log ORDER BY revision LIMIT 1 OFFSET 1) ORDER BY revision LIMIT 1`,
			s.historyBytes-s.historyBytes/16, 256+c.logged/32, 16*groupBytes+2*c.logged)
		// By itself: with a function in its WHERE, SQLite would copy all that it deletes, to be able to undo it.
		c.exec(`DELETE FROM zestor_log WHERE revision < ?`, first)
	}
}

// restartWAL makes the next write begin the write-ahead log anew when it has become long. SQLite does
// so by itself only when nobody reads from it, a moment which overlapping readers never leave; so this
// keeps the store from writing until the last has gone. One try waits at a place in the log that later
// readers keep taken, so it takes several. Other stores write only between them: little, until they
// have taken most of a BusyTimeout. If all are in vain, the log may double before the next.
func (s *sqliteEngine) restartWAL(c *conn) {
	// A change writes whole pages, of the table and of the log; and twice as much where it splits or joins
	// pages, so that below this goes only half the way before it looks again.
	s.room -= s.page*(3+2*c.changes) + 2*c.logged
	if s.room > 0 {
		return
	}
	if !s.durable { // else each write waits for fsync, which takes longer while the log grows
		c.exec(`PRAGMA wal_autocheckpoint = 2900`) // pages, not 1000: rarely, but before this has to
	}
	s.page = max(1, as[int64](c.exec(`PRAGMA page_size`)))
	length := int64(maxWAL)                                  // of the log
	for log := range c.rows(`PRAGMA wal_checkpoint(NOOP)`) { // only says how many pages it has, or that it is busy
		if log[0] == int64(0) {
			length = as[int64](log[1]) * s.page
		}
	}
	s.room = max((maxWAL-length)/2, maxWAL/16)
	start := time.Now()
	wait := func(d time.Duration) { c.exec(fmt.Sprint(`PRAGMA busy_timeout = `, d.Milliseconds())) }
	for length >= maxWAL && c.err == nil && time.Since(start) < 3300*time.Millisecond {
		s.room = length
		// A short try misses the end of long reads if others write between; a long one keeps them from it.
		wait(max(lockPoll, min(100*lockPoll, s.busyTimeout/4)-time.Since(start)))
		for log := range c.rows(`PRAGMA wal_checkpoint(RESTART)`) {
			now := as[int64](log[1]) * s.page // negative while another restarts it
			if log[0] == int64(0) || 0 <= now && now < length {
				length, s.room = 0, maxWAL/2 // here or elsewhere it is done
			}
		}
		time.Sleep(max(lockPoll/100, min(2*lockPoll, time.Since(start)-s.busyTimeout/3*2)))
	}
	c.err = nil // the commit has succeeded
	wait(lockPoll)
}

// tail publishes the changes after a revision until nobody waits for them. It looks after each commit
// of this store; and for those of others every pollInterval, sooner after a change, which may have an
// answer, and at random, lest one who writes at a steady pace always wait for the longest.
func (c *core[T, V]) tail(since int64) {
	for wait := pollInterval; since >= 0; {
		var changes []*Event[V]
		newest, lost, room, before := c.hub.newest.Load(), int64(0), groupBytes, since
		err := c.engine.read(false, func(s snapshot[V]) error {
			any(s).(*conn).busyTimeout = 10 * lockPoll // Close may wait for this
			if s.revision() < newest {                 // somebody has restored an older state
				lost = newest
				return ErrCompacted
			}
			return s.history(since, func(ev *Event[V]) bool {
				changes, since = append(changes, ev), ev.Revision
				room -= len(as[[]byte](ev.Value)) + groupBytes/256 // for 256 changes at most
				return room > 0
			})
		})
		if errors.Is(err, errLocked) { // which ends some time
			err = nil
		} else if err != nil && err != ErrCompacted {
			changes, since = nil, before // without its directory SQLite may read what a failed commit left
		}
		if since = c.hub.publish(since, lost, err, changes...); len(changes) > 0 {
			wait = pollInterval / 4
		} else if since >= 0 {
			select {
			case <-c.hub.wake:
			case <-time.After((wait/2 + rand.N(wait)).Round(time.Millisecond)): // a fraction costs a second wake-up
			}
			wait = min(wait*5/4, pollInterval)
		}
	}
}

func (s *sqliteEngine) close() {
	for _, c := range s.idle { // without mu: no call is under way
		c.Close() // never fails: what SQLite could not finish it frees later, sqlite.org/c3ref/close.html
	}
}
