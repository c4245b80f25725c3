package handover

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sample() *Snapshot {
	return &Snapshot{
		Header: Header{
			Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Serial: 7, TrustDomain: "acme.example",
			HostID: "h1", Controller: "198.51.100.5:7443", Instance: "/run/symbolon/proxy.sock", InKeyring: true,
		},
		Policy: []byte("policy"), Host: []byte("the host's secret"), Workloads: []byte("workloads' secrets"),
	}
}

func TestSnapshotComesBack(t *testing.T) {
	b, err := sample().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := UnmarshalSnapshot(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample(), got); diff != "" {
		t.Error(diff)
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(format, got); strings.Contains(s, "secret") || !strings.Contains(s, "h1") {
			t.Errorf("%s prints %q", format, s)
		}
	}
	got.Wipe()
	if bytes.Contains(b, []byte("secret")) {
		t.Error("keys are left after Wipe")
	}
}

func TestMalformedSnapshots(t *testing.T) {
	good, err := sample().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	version := len(magic)
	change := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	for name, tc := range map[string]struct {
		b    []byte
		want error
	}{
		"empty":          {nil, ErrFormat},
		"other bytes":    {[]byte(strings.Repeat("x", 100)), ErrFormat},
		"newer":          {change(func(b []byte) []byte { b[version+3] = formatVersion + 1; return b }), ErrNewerFormat},
		"version 0":      {change(func(b []byte) []byte { b[version+3] = 0; return b }), ErrFormat},
		"one byte more":  {append(bytes.Clone(good), 0), ErrFormat},
		"a giant length": {change(func(b []byte) []byte { binary.BigEndian.PutUint32(b[version+4:], 1<<31); return b }), ErrFormat},
		"not JSON":       {change(func(b []byte) []byte { b[version+8] = 'x'; return b }), ErrFormat},
	} {
		if _, err := UnmarshalSnapshot(tc.b); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	for n := range good {
		if _, err := UnmarshalSnapshot(good[:n]); !errors.Is(err, ErrFormat) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
	big := sample()
	big.Policy = make([]byte, MaxSnapshot)
	if _, err := big.Marshal(); err == nil {
		t.Error("a snapshot beyond the bound was made")
	}
}

func FuzzUnmarshalSnapshot(f *testing.F) {
	good, err := sample().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := UnmarshalSnapshot(b)
		if err != nil {
			if s != nil || !errors.Is(err, ErrFormat) && !errors.Is(err, ErrNewerFormat) {
				t.Errorf("%v, %v", s, err)
			}
			return
		}
		again, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := UnmarshalSnapshot(again)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, back); diff != "" {
			t.Error(diff)
		}
	})
}

func TestMemoryFiles(t *testing.T) {
	f, err := Seal("test", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 { // the offset is not used up
		if b, err := Unseal(f); err != nil || string(b) != "secret" {
			t.Errorf("%q, %v", b, err)
		}
	}
	if _, err := f.WriteAt([]byte("S"), 0); err == nil {
		t.Error("a sealed file was written")
	}
	file, err := createTemp(t)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Unseal(file); !errors.Is(err, ErrNotSealed) {
		t.Errorf("a file on a disk: %v", err)
	}
	open, err := unsealed()
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := Unseal(open); !errors.Is(err, ErrNotSealed) {
		t.Errorf("a memory file that can be changed: %v", err)
	}
}
