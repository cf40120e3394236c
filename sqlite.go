package zestor

import (
	"bytes"
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	sqlite3 "github.com/mattn/go-sqlite3"
)

// The schema. Triggers fill the log in the transaction of the change, so that
// whoever writes, it is complete. They also number the changes: a write that
// comes with the next revision is the store's own and is only logged; to any
// other they give its version, revision and time.
//
// The newest row of the log can't be deleted, since it is where the store's
// revision is kept. position counts the bytes logged before a row, so that the
// log can be cut to a size without adding it up; it stands before the value,
// so that it is read without it.
const (
	schemaVersion = 1
	tableColumns  = "kind:1 key:2 value:0 version:0 updated_at:0 revision:0"
	oldColumns    = "kind:1 key:2 value:0 version:0 updated_at:0" // of the multi-package Zestor
	schemaObjects = 6                                             // zestor_log and the triggers

	createTable = `CREATE TABLE zestor_kv (
		kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
		version INTEGER NOT NULL DEFAULT 1,
		updated_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
		revision INTEGER NOT NULL DEFAULT 0,
		PRIMARY KEY (kind, key)) WITHOUT ROWID`

	newest  = `(SELECT max(revision) FROM zestor_log)`
	logSize = `length(CAST(kind AS BLOB)) + length(CAST(key AS BLOB)) + length(value) + 64` // see sizeOf
	logEnd  = `ifnull((SELECT position + ` + logSize + ` FROM zestor_log ORDER BY revision DESC LIMIT 1), 0)`
	repair  = `revision = ` + newest + `, updated_at = strftime('%Y-%m-%dT%H:%M:%fZ','now')
			WHERE kind = NEW.kind AND key = NEW.key AND NEW.revision <> ` + newest

	createLog = `
	CREATE TABLE zestor_log (
		revision INTEGER PRIMARY KEY, position INTEGER NOT NULL, type TEXT NOT NULL,
		version INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL);
	CREATE TRIGGER zestor_insert AFTER INSERT ON zestor_kv BEGIN
		SELECT RAISE(ABORT, 'zestor: kind and key must be non-empty text')
			WHERE typeof(NEW.kind) <> 'text' OR typeof(NEW.key) <> 'text' OR NEW.kind = '' OR NEW.key = '';
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'create', 1, NEW.kind, NEW.key, CAST(NEW.value AS BLOB));
		UPDATE zestor_kv SET version = 1, ` + repair + `;
	END;
	CREATE TRIGGER zestor_update AFTER UPDATE OF value ON zestor_kv
	WHEN CAST(NEW.value AS BLOB) IS NOT CAST(OLD.value AS BLOB) OR NEW.revision = ` + newest + ` + 1 BEGIN
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'update', OLD.version + 1, NEW.kind, NEW.key, CAST(NEW.value AS BLOB));
		UPDATE zestor_kv SET version = OLD.version + 1, ` + repair + `;
	END;
	CREATE TRIGGER zestor_delete AFTER DELETE ON zestor_kv BEGIN
		INSERT INTO zestor_log VALUES (NULL, ` + logEnd + `, 'delete', OLD.version, OLD.kind, OLD.key, CAST(OLD.value AS BLOB));
	END;
	CREATE TRIGGER zestor_rename BEFORE UPDATE OF kind, key ON zestor_kv
	WHEN NEW.kind IS NOT OLD.kind OR NEW.key IS NOT OLD.key BEGIN
		SELECT RAISE(ABORT, 'zestor: kind and key cannot be updated: delete and insert');
	END;
	CREATE TRIGGER zestor_keep BEFORE DELETE ON zestor_log WHEN OLD.revision = ` + newest + ` BEGIN
		SELECT RAISE(IGNORE);
	END;
	PRAGMA user_version = 1`

	// The last row marks where the history begins. It is no change, so it
	// can't be replayed.
	upgradeTable = `
	ALTER TABLE zestor_kv ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
	UPDATE zestor_kv SET revision = number FROM
		(SELECT kind AS k, key AS y, row_number() OVER (ORDER BY kind, key) AS number FROM zestor_kv)
		WHERE kind = k AND key = y;
	DROP INDEX IF EXISTS idx_kv_kind;` + createLog + `;
	INSERT INTO zestor_log SELECT n, 0, 'upgrade', 0, '', '', x'' FROM (SELECT count(*) AS n FROM zestor_kv) WHERE n > 0`
)

// sizeOf is how much of HistoryBytes a change takes.
func sizeOf(kind, key string, value []byte) int64 {
	return int64(len(kind) + len(key) + len(value) + 64)
}

const (
	// maxSize is what SQLite stores in one row, less what a row needs besides
	// kind, key and value. Source: sqlite.org/limits.html, item 1.
	maxSize = 1_000_000_000 - 1024

	// readers is how many connections serve short reads. More starve the
	// writer on a small machine.
	readers = 4

	// pollInterval is how often a watched store looks for the commits of
	// other processes. Its own wake it at once.
	pollInterval = 12 * time.Millisecond

	// lockPoll is how long SQLite itself waits for a lock. It backs off to
	// 100 ms between tries, at which a busy file starves it; so it gets little
	// time, and is asked again until BusyTimeout is over.
	lockPoll = 10 * time.Millisecond

	// groupBytes ends a shared transaction.
	groupBytes = 1 << 20

	// maxWAL is the size at which the writer waits for readers to let go of
	// the write-ahead log. SQLite reuses it from the start only when nobody
	// reads it, which overlapping readers never allow.
	maxWAL = 8 << 20
)

// SQLiteOptions are the options of a SQLite store. Only DSN is required.
type SQLiteOptions[T any] struct {
	StoreOptions[T]

	// DSN is a path, taken literally; or a URI "file:path?parameters", with
	// %-escapes in the path; or ":memory:" for a private store that ends with
	// Close. The parameters are mode (ro, rw, rwc), immutable, _synchronous
	// or _sync (SQLite's levels, default FULL), and _busy_timeout or _timeout
	// in milliseconds; cache is ignored; any other is an error.
	//
	// With mode=ro the file must exist and be a Zestor file. A write that
	// would change it fails.
	DSN string

	// Codec encodes values; nil means JSON.
	Codec Codec

	// BusyTimeout is how long to wait for another process's lock before a
	// call fails; 0 means what the DSN says, or 5 s; negative is an error.
	BusyTimeout time.Duration

	// DisableWAL gives a new file SQLite's rollback journal, in which readers
	// and writers wait for each other. An existing file keeps its mode.
	// Without it a file is put into WAL mode if it can be.
	DisableWAL bool

	// HistoryBytes is how much of the newest changes the file keeps for
	// watchers: keys, kinds, values, and 64 bytes a change. 0 means 16 MiB;
	// negative is an error. With different limits on one file the smallest
	// wins. The newest change is always kept.
	HistoryBytes int64
}

// NewSQLiteStore opens the store in a SQLite file, and makes one of an absent
// or empty file. A file of the multi-package Zestor is upgraded. A file that
// is no database, a database that is no Zestor file, and one that a newer
// Zestor wrote are errors that name the path, and left as they are.
//
// Several processes, and several stores of different types that keep to their
// own kinds, may have one file open. The package must be built with cgo.
func NewSQLiteStore[T any](opts SQLiteOptions[T]) (Store[T], error) {
	if opts.Codec == nil {
		opts.Codec = JSON{}
	}
	e := &sqliteEngine{busyTimeout: opts.BusyTimeout, historyBytes: opts.HistoryBytes, oldest: -1, walLimit: maxWAL,
		slots: make(chan struct{}, readers), turn: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
	if err := e.open(opts.DSN, opts.DisableWAL); err != nil {
		return nil, place{"open"}.fail(fmt.Errorf("%s: %w", printable(opts.DSN), err))
	}
	return newCore(e, opts.StoreOptions, encoder[T](opts.Codec), decoder[T](opts.Codec), bytes.Equal), nil
}

// dsn is a parsed DSN.
type dsn struct {
	path        string // absolute; "" is ":memory:"
	mode        string
	immutable   bool
	synchronous string
	busyTimeout time.Duration
}

func parseDSN(text string) (d dsn, err error) {
	d = dsn{mode: "rwc", synchronous: "FULL", busyTimeout: 5 * time.Second}
	path, query := text, ""
	if uri, ok := strings.CutPrefix(text, "file:"); ok {
		uri, _, _ = strings.Cut(uri, "#")
		path, query, _ = strings.Cut(uri, "?")
		if host, ok := strings.CutPrefix(path, "//"); ok {
			host, path, _ = strings.Cut(host, "/")
			path = "/" + path
			if host != "" && host != "localhost" {
				return d, fmt.Errorf("a file: URI can't name the host %q", host)
			}
		}
		if path, err = url.PathUnescape(path); err != nil {
			return d, err
		}
	} else if strings.Contains(text, "?") {
		return d, fmt.Errorf("a path with a ? is ambiguous: write file:%s for parameters, or file:%s for that very name", text, escapePath(text))
	}
	params, err := url.ParseQuery(query)
	if err != nil {
		return d, err
	}
	for name, values := range params {
		if err := d.set(name, values[len(values)-1]); err != nil {
			return d, err
		}
	}
	switch {
	case path == "":
		return d, errors.New("DSN required: a path, a file: URI, or :memory:")
	case strings.Contains(path, "\x00"):
		return d, errors.New("a NUL byte in the path")
	case path == ":memory:":
		return d, nil
	}
	d.path, err = filepath.Abs(path) // the program may change its directory
	return d, err
}

func (d *dsn) set(name, value string) (err error) {
	ok := true
	switch name {
	case "mode":
		d.mode = value
		ok = value == "ro" || value == "rw" || value == "rwc"
	case "immutable":
		d.immutable, err = strconv.ParseBool(value)
	case "_synchronous", "_sync":
		d.synchronous = strings.ToUpper(value)
		ok = slices.Contains([]string{"0", "OFF", "1", "NORMAL", "2", "FULL", "3", "EXTRA"}, d.synchronous)
	case "_busy_timeout", "_timeout":
		var ms int64
		ms, err = strconv.ParseInt(value, 10, 32)
		d.busyTimeout, ok = time.Duration(ms)*time.Millisecond, ms >= 0
	case "cache": // shared, it would only bring "table is locked"
	default:
		return fmt.Errorf("unknown parameter %q", name)
	}
	if err != nil || !ok {
		return fmt.Errorf("parameter %s can't be %q", name, value)
	}
	return nil
}

func (d *dsn) private() bool  { return d.path == "" }
func (d *dsn) readOnly() bool { return d.mode == "ro" || d.immutable }

// uri is what the driver is given for a connection. No two goroutines use one
// at once, so it needs no mutex of SQLite's.
func (d *dsn) uri() string {
	params := fmt.Sprintf("?_mutex=no&_synchronous=%s&_busy_timeout=%d", d.synchronous, lockPoll.Milliseconds())
	if d.private() {
		return ":memory:" + params
	}
	path := filepath.ToSlash(d.path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // C:/...
	}
	return fmt.Sprintf("file://%s%s&mode=%s&immutable=%t", escapePath(path), params, d.mode, d.immutable)
}

func escapePath(path string) string { return (&url.URL{Path: path}).EscapedPath() }

// sqliteEngine keeps encoded values in a SQLite file.
//
// Locks are taken in this order: turn or slots, gate, then mu.
type sqliteEngine struct {
	dsn          dsn
	busyTimeout  time.Duration
	historyBytes int64
	wal          bool          // else readers and writers wait for each other, at gate
	file         os.FileInfo   // what the path named when it was opened
	slots        chan struct{} // holds a token for each short read under way
	turn         chan struct{} // holds a token while somebody writes
	wake         chan struct{} // holds a token after a commit, for the tail
	gate         sync.RWMutex

	mu      sync.Mutex
	idle    []*conn    // protected by mu; for reading
	waiting []*request // protected by mu; writes that may share a transaction

	writer   *conn // whose turn it is uses it; nil until the first write
	oldest   int64 // the same; position of the log's oldest row as far as known, or -1
	grown    int64 // the same; what may have gone into the WAL since its size was looked at
	walLimit int64 // the same; the size at which to wait for readers
}

func (s *sqliteEngine) open(text string, disableWAL bool) (err error) {
	if s.dsn, err = parseDSN(text); err != nil {
		return err
	}
	switch {
	case s.busyTimeout < 0:
		return fmt.Errorf("negative BusyTimeout %v", s.busyTimeout)
	case s.historyBytes < 0:
		return fmt.Errorf("negative HistoryBytes %d", s.historyBytes)
	case s.busyTimeout == 0:
		s.busyTimeout = s.dsn.busyTimeout
	}
	if s.historyBytes == 0 {
		s.historyBytes = 16 << 20
	}
	c, err := s.connect()
	if err != nil {
		return err
	}
	if err := s.prepare(c, disableWAL); err != nil {
		c.close()
		return err
	}
	if s.dsn.private() {
		s.writer = c
	} else {
		s.idle = []*conn{c}
		s.dsn.mode = strings.TrimSuffix(s.dsn.mode, "c") // the file is there now
	}
	return nil
}

// prepare sees to it that the file has the schema.
func (s *sqliteEngine) prepare(c *conn, disableWAL bool) (err error) {
	if !s.dsn.private() {
		if s.file, err = os.Stat(s.dsn.path); err != nil {
			return err
		}
	}
	script, err := c.inspect()
	if err == nil && script != "" {
		if s.dsn.readOnly() {
			return errors.New("not a Zestor file of this version, and opened read-only it can't be made or upgraded to one")
		}
		err = c.transaction("BEGIN IMMEDIATE", func() error {
			script, err := c.inspect() // another process may have been faster
			if err == nil && script != "" {
				_, err = c.Conn.(driver.ExecerContext).ExecContext(context.Background(), script, nil)
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	mode := c.exec("PRAGMA journal_mode")
	if c.err == nil && asText(mode[0]) != "wal" && !disableWAL && !s.dsn.readOnly() && !s.dsn.private() {
		if now := c.exec("PRAGMA journal_mode = WAL"); now != nil {
			mode = now
		}
		c.err = nil // it is in use, or can't have a WAL: the mode it has will do
	}
	s.wal = c.err == nil && asText(mode[0]) == "wal"
	return c.err
}

// inspect returns the SQL that makes the file one of this schema, "" for one
// that is, and an error for one that can't be.
func (c *conn) inspect() (string, error) {
	v := c.exec(`SELECT
		(SELECT user_version FROM pragma_user_version),
		(SELECT encoding FROM pragma_encoding),
		(SELECT count(*) FROM sqlite_schema WHERE name NOT LIKE 'sqlite^_%' ESCAPE '^' AND name <> 'zestor_kv'),
		(SELECT count(*) FROM sqlite_schema WHERE name IN
			('zestor_log', 'zestor_insert', 'zestor_update', 'zestor_delete', 'zestor_rename', 'zestor_keep')),
		(SELECT group_concat(name || ':' || pk, ' ') FROM pragma_table_info('zestor_kv'))`)
	if c.err != nil {
		return "", c.err
	}
	version, encoding, others, objects, columns := asInt(v[0]), asText(v[1]), asInt(v[2]), asInt(v[3]), asText(v[4])
	switch {
	case columns == "" && others > 0:
		return "", errors.New("not a Zestor file: it has tables, but no zestor_kv")
	case version > schemaVersion:
		return "", fmt.Errorf("written by a newer Zestor: its schema has version %d, this program knows %d", version, schemaVersion)
	case encoding != "UTF-8":
		return "", fmt.Errorf("not a Zestor file: its text is encoded as %s", encoding)
	case version == schemaVersion && columns == tableColumns && objects == schemaObjects:
		return "", nil
	case version == 0 && columns == "":
		return createTable + ";" + createLog, nil
	case version == 0 && columns == oldColumns && objects == 0:
		return upgradeTable, nil
	}
	return "", fmt.Errorf("not a Zestor file: version %d, %d of %d other objects, and a table zestor_kv with the columns %q",
		version, objects, schemaObjects, columns)
}

// conn is one connection, and the state of its transaction or snapshot. One
// goroutine uses it at a time.
type conn struct {
	driver.Conn
	busyTimeout time.Duration
	stmts       map[string]*stmt
	cursors     int   // rows being read
	broken      bool  // not to be used again
	err         error // the first of SQLite's since the connection was borrowed: nothing is run after it

	newest int64 // revision of the newest change
	end    int64 // of the log, in bytes
	wrote  int   // changes in this transaction
}

type stmt struct {
	driver.Stmt
	args []driver.NamedValue
	row  []driver.Value
	busy bool
}

// connect opens a connection to the file that was opened first.
func (s *sqliteEngine) connect() (*conn, error) {
	c := &conn{busyTimeout: s.busyTimeout, stmts: make(map[string]*stmt)}
	uri := s.dsn.uri()
	err := c.retry(func() (err error) {
		c.Conn, err = new(sqlite3.SQLiteDriver).Open(uri)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.moved(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// moved fails if the path names another file than it did at first. What is
// written to that would be lost to everybody else.
func (s *sqliteEngine) moved() error {
	if s.file == nil {
		return nil
	}
	file, err := os.Stat(s.dsn.path)
	if err == nil && !os.SameFile(file, s.file) {
		err = fmt.Errorf("%s is another file", s.dsn.path)
	}
	if err != nil {
		return fmt.Errorf("the file was removed or replaced while it was open: %w", err)
	}
	return nil
}

// retry repeats what fails because of another connection's lock.
func (c *conn) retry(fn func() error) error {
	var start time.Time
	for {
		err := fn()
		if err == nil || !isBusy(err) {
			return err
		}
		if start.IsZero() {
			start = time.Now().Add(-lockPoll)
		}
		if time.Since(start) >= c.busyTimeout {
			return fmt.Errorf("another process kept the file locked, for longer than the BusyTimeout of %v: %w", c.busyTimeout, err)
		}
	}
}

// isBusy knows SQLITE_BUSY and SQLITE_PROTOCOL. The driver's type for errors
// does not exist without cgo.
func isBusy(err error) bool {
	v := reflect.ValueOf(err)
	if v.Kind() != reflect.Struct || !v.FieldByName("Code").CanInt() {
		return false
	}
	code := v.FieldByName("Code").Int()
	return code == 5 || code == 15
}

// rows runs a statement and yields its rows; c.err says afterwards whether
// that were all. The slice is reused, its values are not.
func (c *conn) rows(sql string, args ...driver.Value) iter.Seq[[]driver.Value] {
	return func(yield func([]driver.Value) bool) {
		if c.err != nil {
			return
		}
		st := c.stmts[sql]
		if st == nil || st.busy {
			st = new(stmt)
			if st.Stmt, c.err = c.Prepare(sql); c.err != nil {
				return
			}
			if c.stmts[sql] == nil {
				c.stmts[sql] = st
			} else {
				defer st.Close() // a scan inside another
			}
		}
		st.args = st.args[:0]
		for i, arg := range args {
			st.args = append(st.args, driver.NamedValue{Ordinal: i + 1, Value: arg})
		}
		var rows driver.Rows
		c.err = c.retry(func() (err error) {
			rows, err = st.Stmt.(driver.StmtQueryContext).QueryContext(context.Background(), st.args)
			return err
		})
		clear(st.args)
		if c.err != nil {
			return
		}
		st.busy = true
		c.cursors++
		defer func() {
			rows.Close()
			c.cursors--
			st.busy = false
		}()
		if st.row == nil {
			st.row = make([]driver.Value, len(rows.Columns()))
		}
		for {
			if err := rows.Next(st.row); err != nil {
				if err != io.EOF {
					c.err = err
				}
				return
			}
			if !yield(st.row) {
				return
			}
		}
	}
}

// exec runs a statement to its end and returns its last row, if it has any.
func (c *conn) exec(sql string, args ...driver.Value) (last []driver.Value) {
	for v := range c.rows(sql, args...) {
		last = v
	}
	for _, arg := range args {
		// The driver keeps a copy of the arguments as long as the statement.
		if st := c.stmts[sql]; st != nil && len(asBytes(arg))+len(asText(arg)) > groupBytes {
			st.Close()
			delete(c.stmts, sql)
		}
	}
	return last
}

// transaction commits if fn returns nil.
func (c *conn) transaction(begin string, fn func() error) (err error) {
	c.wrote = 0
	if c.exec(begin); c.err != nil {
		return c.err
	}
	committed := false
	defer func() { // also after a panic or Goexit
		if !committed {
			c.err = nil
			c.exec("ROLLBACK") // SQLite may have done so itself
			state, ok := c.Conn.(interface{ AutoCommit() bool })
			c.broken = ok && !state.AutoCommit()
		}
	}()
	if err = fn(); err == nil {
		c.exec("COMMIT")
		err = c.err
	}
	committed = err == nil
	return err
}

func (c *conn) close() error {
	for _, st := range c.stmts {
		st.Close()
	}
	return c.Conn.Close()
}

// A damaged or hand-made file may hold other types than the schema says.
func asInt(v driver.Value) int64    { n, _ := v.(int64); return n }
func asText(v driver.Value) string  { text, _ := v.(string); return text }
func asBytes(v driver.Value) []byte { data, _ := v.([]byte); return data }

// borrow lends fn a connection for reading.
func (s *sqliteEngine) borrow(fn func(*conn) error) (err error) {
	switch {
	case s.dsn.private():
		s.gate.Lock()
		defer s.gate.Unlock()
		s.writer.err = nil
		return fn(s.writer)
	case !s.wal:
		s.gate.RLock()
		defer s.gate.RUnlock()
	}
	var c *conn
	s.mu.Lock()
	if n := len(s.idle); n > 0 {
		c, s.idle = s.idle[n-1], s.idle[:n-1]
	}
	s.mu.Unlock()
	if c == nil {
		if c, err = s.connect(); err != nil {
			return err
		}
	}
	defer func() {
		s.mu.Lock()
		// Nobody else may use what an iterator that outlived its View reads.
		keep := len(s.idle) < readers && c.cursors == 0 && !c.broken
		if keep {
			s.idle = append(s.idle, c)
		}
		s.mu.Unlock()
		if !keep {
			c.close()
		}
	}()
	c.err = nil
	return fn(c)
}

func (s *sqliteEngine) read(fn func(snapshot[[]byte]) error) error {
	s.slots <- struct{}{}
	defer func() { <-s.slots }()
	return s.borrow(func(c *conn) error { return fn(c) })
}

// view needs no slot, since it may last, and others may begin inside.
func (s *sqliteEngine) view(fn func(snapshot[[]byte]) error) error {
	return s.borrow(func(c *conn) error {
		return c.transaction("BEGIN", func() error {
			if _, err := c.revision(); err != nil { // the first read takes the snapshot
				return err
			}
			return fn(c)
		})
	})
}

func (s *sqliteEngine) streams() bool { return s.wal }

func (c *conn) get(kind, key string) (*Entry[[]byte], error) {
	v := c.exec(`SELECT CAST(value AS BLOB), version, revision, updated_at FROM zestor_kv WHERE kind = ? AND key = ?`, kind, key)
	if v == nil {
		return nil, c.err
	}
	r := rowOf(kind, key, v)
	return &r, nil
}

func rowOf(kind, key string, v []driver.Value) Entry[[]byte] {
	r := Entry[[]byte]{kind, key, asBytes(v[0]), asInt(v[1]), asInt(v[2]), time.Time{}}
	if at, err := time.Parse(time.RFC3339Nano, asText(v[3])); err == nil {
		r.UpdatedAt = at.UTC().Truncate(time.Millisecond)
	}
	return r
}

func (c *conn) scan(kind string, r Range) iter.Seq2[Entry[[]byte], error] {
	lo, hi, bounded := r.bounds()
	var to driver.Value = hi
	if !bounded {
		to = []byte{} // SQLite sorts every blob behind every text
	}
	sql := `SELECT CAST(value AS BLOB), version, revision, updated_at, kind, key FROM zestor_kv
		WHERE kind = ? AND key >= ? AND key < ? ORDER BY key LIMIT ?`
	if r.Descending {
		sql = `SELECT CAST(value AS BLOB), version, revision, updated_at, kind, key FROM zestor_kv
		WHERE kind = ? AND key >= ? AND key < ? ORDER BY key DESC LIMIT ?`
	}
	if r.Limit == 0 {
		r.Limit = -1
	}
	return c.entries(sql, kind, lo, to, int64(r.Limit))
}

func (c *conn) all() iter.Seq2[Entry[[]byte], error] {
	return c.entries(`SELECT CAST(value AS BLOB), version, revision, updated_at, kind, key FROM zestor_kv`)
}

func (c *conn) entries(sql string, args ...driver.Value) iter.Seq2[Entry[[]byte], error] {
	return func(yield func(Entry[[]byte], error) bool) {
		for v := range c.rows(sql, args...) {
			if !yield(rowOf(asText(v[4]), asText(v[5]), v), nil) {
				return
			}
		}
		if c.err != nil {
			yield(Entry[[]byte]{}, c.err)
		}
	}
}

func (c *conn) keys(kind string) ([]string, error) {
	keys := []string{}
	for v := range c.rows(`SELECT key FROM zestor_kv WHERE kind = ? ORDER BY key`, kind) {
		keys = append(keys, asText(v[0]))
	}
	return keys, c.err
}

func (c *conn) count(kind string) (n int, err error) {
	for v := range c.rows(`SELECT count(*) FROM zestor_kv WHERE kind = ?`, kind) {
		n = int(asInt(v[0]))
	}
	return n, c.err
}

// revision also finds the end of the log.
func (c *conn) revision() (int64, error) {
	c.newest, c.end = 0, 0
	for v := range c.rows(`SELECT revision, position + ` + logSize + ` FROM zestor_log ORDER BY revision DESC LIMIT 1`) {
		c.newest, c.end = asInt(v[0]), asInt(v[1])
	}
	return c.newest, c.err
}

// A gapError is ErrCompacted at a gap in the log. It is the revision after
// which the log goes on.
type gapError int64

func (gapError) Error() string        { return ErrCompacted.Error() }
func (gapError) Is(target error) bool { return target == ErrCompacted }

func (c *conn) history(since int64) iter.Seq2[Event[[]byte], error] {
	return func(yield func(Event[[]byte], error) bool) {
		for v := range c.rows(`SELECT value, version, revision, NULL, kind, key, type FROM zestor_log
			WHERE revision > ? ORDER BY revision`, since) {
			e := rowOf(asText(v[4]), asText(v[5]), v)
			ch := *e.event(EventType(asText(v[6])))
			since++
			var err error
			if ch.Revision != since {
				err = gapError(ch.Revision - 1)
			} else if ch.Type != EventCreate && ch.Type != EventUpdate && ch.Type != EventDelete {
				err = gapError(ch.Revision)
			}
			if !yield(ch, err) || err != nil {
				return
			}
		}
		if c.err != nil {
			yield(Event[[]byte]{}, c.err)
		}
	}
}

func (c *conn) put(kind, key string, value []byte, version int64) (int64, error) {
	size := sizeOf(kind, key, value)
	if size > maxSize {
		return 0, fmt.Errorf("too big: %d bytes, where SQLite takes at most %d", size, maxSize)
	}
	sql := `UPDATE zestor_kv SET value = ?3, version = ?4, updated_at = ?5, revision = ?6 WHERE kind = ?1 AND key = ?2`
	if version == 1 {
		sql = `INSERT INTO zestor_kv (kind, key, value, version, updated_at, revision) VALUES (?, ?, ?, ?, ?, ?)`
	}
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	c.exec(sql, kind, key, value, version, now, c.newest+1)
	c.logged(size)
	return c.newest, c.err
}

func (c *conn) remove(old *Entry[[]byte]) error {
	c.exec(`DELETE FROM zestor_kv WHERE kind = ? AND key = ?`, old.Kind, old.Key)
	c.logged(sizeOf(old.Kind, old.Key, old.Value))
	return c.err
}

// logged counts what a trigger has logged.
func (c *conn) logged(size int64) {
	c.newest++
	c.end += size
	c.wrote++
}

// A request is a write that may share a transaction with others.
type request struct {
	fn   func(transaction[[]byte]) error
	err  error
	done chan struct{} // closed after the commit
}

// write waits for its turn. Shared writes are group commit: whose turn it is
// does the work of all that wait, and they return with it.
func (s *sqliteEngine) write(shared bool, fn func(transaction[[]byte]) error) error {
	if !shared {
		s.turn <- struct{}{}
		defer func() { <-s.turn }()
		return s.transact(func(c *conn) error { return fn(c) })
	}
	r := &request{fn, nil, make(chan struct{})}
	s.mu.Lock()
	s.waiting = append(s.waiting, r)
	s.mu.Unlock()
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

// group commits waiting requests in one transaction. An error that ends it is
// everybody's, one of a request itself only its own.
func (s *sqliteEngine) group() {
	var group []*request
	next := func() *request {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.waiting) == 0 {
			return nil
		}
		r := s.waiting[0]
		s.waiting = s.waiting[1:]
		group = append(group, r)
		return r
	}
	r := next()
	if r == nil {
		return // somebody else did it all
	}
	err := s.transact(func(c *conn) error {
		for limit := c.end + groupBytes; ; {
			if r.err = r.fn(c); c.err != nil || c.end > limit {
				return c.err
			}
			if r = next(); r == nil {
				return nil
			}
		}
	})
	for _, r := range group {
		if err != nil {
			r.err = err
		}
		close(r.done)
	}
}

// transact is the one way to write. It is for whose turn it is.
func (s *sqliteEngine) transact(fn func(*conn) error) (err error) {
	if !s.wal {
		s.gate.Lock()
		defer s.gate.Unlock()
	}
	if err := s.moved(); err != nil {
		return err
	}
	if s.writer == nil {
		if s.writer, err = s.connect(); err != nil {
			return err
		}
	}
	c := s.writer
	c.err = nil
	defer func() {
		if c.broken && !s.dsn.private() {
			c.close()
			s.writer = nil
		}
	}()
	begin := "BEGIN IMMEDIATE"
	if s.dsn.readOnly() {
		begin = "BEGIN" // a write that changes nothing needs no more
	}
	err = c.transaction(begin, func() error {
		if _, err := c.revision(); err != nil {
			return err
		}
		s.grown += 16<<10 - 2*c.end // a commit writes whole pages, and every change twice
		if err := fn(c); err != nil {
			return err
		}
		s.grown += 2 * c.end
		s.trim(c)
		return c.err
	})
	switch {
	case err != nil:
		s.oldest, s.grown = -1, maxWAL
	case c.wrote > 0:
		s.signal()
		s.limitWAL(c)
	}
	return err
}

// trim cuts the log to the newest changes that fit historyBytes. When it has
// to, it cuts a little more, so that most writes find nothing to do; and never
// many more rows than the transaction has written.
func (s *sqliteEngine) trim(c *conn) {
	low := c.end - s.historyBytes
	if c.wrote == 0 || s.oldest >= low {
		return
	}
	last, most := int64(0), 256+2*c.wrote
	for v := range c.rows(`SELECT revision, position FROM zestor_log ORDER BY revision`) {
		s.oldest = asInt(v[1])
		if most == 0 || s.oldest >= low || asInt(v[0]) == c.newest {
			break
		}
		if last == 0 {
			low += s.historyBytes / 16
		}
		last = asInt(v[0])
		most--
	}
	if last > 0 {
		c.exec(`DELETE FROM zestor_log WHERE revision <= ?`, last)
	}
}

// limitWAL empties the write-ahead log when it has become long. SQLite starts
// it anew only at a moment when nobody reads from it, which overlapping
// readers never leave; so the writer keeps others from writing until the last
// of them has gone. If that takes too long the log may grow some more.
func (s *sqliteEngine) limitWAL(c *conn) {
	if s.grown < maxWAL/16 || !s.wal {
		return
	}
	s.grown = 0
	file, err := os.Stat(s.dsn.path + "-wal")
	if err != nil || file.Size() < s.walLimit {
		return
	}
	c.exec(`PRAGMA busy_timeout = 2500`)
	c.exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	c.err = nil
	s.walLimit = maxWAL
	if file, err = os.Stat(s.dsn.path + "-wal"); err == nil && file.Size() >= maxWAL {
		s.walLimit = file.Size() + maxWAL/2
	}
	c.exec(`PRAGMA busy_timeout = 10`)
}

// tail reads the log, at once after a commit of this store, and every
// pollInterval for those of others.
func (s *sqliteEngine) tail(since int64, stop <-chan struct{}, publish func([]Event[[]byte]) bool, lost func(since, upTo int64, err error)) {
	defer s.signal() // the token it took last may be meant for the next tail
	var poll <-chan time.Time
	if !s.dsn.private() {
		ticker := time.NewTicker(pollInterval)
		defer ticker.Stop()
		poll = ticker.C
	}
	for {
		changes, err := s.changes(since)
		var gap gapError
		switch {
		case len(changes) > 0:
			since = changes[len(changes)-1].Revision
			if !publish(changes) {
				return
			}
			continue
		case errors.As(err, &gap):
			lost(since, int64(gap), err)
			since = int64(gap)
			continue
		case err != nil:
			lost(since, math.MaxInt64, err)
		}
		select {
		case <-s.wake:
		case <-poll:
		case <-stop:
			return
		}
	}
}

// changes reads some of the log, or the error that comes first.
func (s *sqliteEngine) changes(since int64) (changes []Event[[]byte], err error) {
	if err := s.moved(); err != nil {
		return nil, err
	}
	size := 0
	err = s.borrow(func(c *conn) error {
		for ch, err := range c.history(since) {
			if err != nil {
				return err
			}
			changes = append(changes, ch)
			if size += len(ch.Value); len(changes) == 256 || size > groupBytes {
				break
			}
		}
		return nil
	})
	return changes, err
}

func (s *sqliteEngine) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *sqliteEngine) close() error {
	if s.writer != nil {
		s.idle = append(s.idle, s.writer)
	}
	var errs []error
	for _, c := range s.idle {
		errs = append(errs, c.close())
	}
	return errors.Join(errs...)
}
