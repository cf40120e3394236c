package zestor

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
)

// Codec turns values into the bytes that a SQLite file holds, and back. Its methods may run on
// several goroutines at once, and must not call the store. In a watch, a panic is the event's Err.
//
// Marshal is handed the T itself. Unmarshal is handed a pointer to a fresh value: a *E where T is a
// pointer *E, so that protobuf messages work, and a *T otherwise. It may keep data, but must not
// change it. Nor may Marshal change what it has returned.
//
// Marshal should encode equal values alike: without a CompareFn it is encodings that the store
// compares, and a codec that encodes one value in several ways makes every Set of it an update.
type Codec interface {
	Marshal(v any) ([]byte, error)
	Unmarshal(data []byte, v any) error
}

// JSON is the default Codec: encoding/json, which encodes equal values alike.
type JSON struct{}

// Marshal returns the JSON encoding of v.
func (JSON) Marshal(v any) ([]byte, error) { return json.Marshal(v) }

// Unmarshal parses JSON into what v points to.
func (JSON) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// NewCodec makes a Codec of two functions. Where one is nil, using it is an error.
func NewCodec(marshal func(v any) ([]byte, error), unmarshal func(data []byte, v any) error) Codec {
	if marshal == nil {
		marshal = func(any) ([]byte, error) { return nil, errors.New("codec has no marshal function") }
	}
	if unmarshal == nil {
		unmarshal = func([]byte, any) error { return errors.New("codec has no unmarshal function") }
	}
	return funcCodec{marshal, unmarshal}
}

type funcCodec struct {
	marshal   func(v any) ([]byte, error)
	unmarshal func(data []byte, v any) error
}

func (c funcCodec) Marshal(v any) ([]byte, error)      { return c.marshal(v) }
func (c funcCodec) Unmarshal(data []byte, v any) error { return c.unmarshal(data, v) }

// encoder returns what encodes a T, never as nil, which SQLite would take for NULL.
func encoder[T any](codec Codec) func(kind, key string, value T) ([]byte, error) {
	return func(kind, key string, value T) ([]byte, error) {
		data, err := codec.Marshal(value)
		if size := len(kind) + len(key) + len(data); err == nil && size > maxSize {
			err = fmt.Errorf("too big: kind, key and value have %d bytes, SQLite takes at most %d", size, maxSize)
		}
		if data == nil {
			data = []byte{}
		}
		return data, err
	}
}

// decoder returns what decodes into a fresh T.
func decoder[T any](codec Codec) func([]byte) (T, error) {
	t := reflect.TypeFor[T]()
	return func(data []byte) (value T, err error) {
		target := any(&value)
		if t.Kind() == reflect.Pointer {
			fresh := reflect.New(t.Elem())
			value, target = fresh.Convert(t).Interface().(T), fresh.Interface() // T may be a named pointer type
		}
		if err = codec.Unmarshal(data, target); err != nil {
			return *new(T), err
		}
		return value, nil
	}
}
