package flow

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func record(id int) *symbolonv1.FlowRecord {
	return &symbolonv1.FlowRecord{FlowId: fmt.Sprint(id)}
}

// ids are the flow ids of JSON lines.
func ids(t *testing.T, written []byte) []string {
	t.Helper()
	var out []string
	for line := range strings.Lines(string(written)) {
		var l Line
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		out = append(out, l.FlowID)
	}
	return out
}

func neverFails(t *testing.T) func(error) { return func(err error) { t.Error(err) } }

// writerFunc is a function as io.Writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestWriterKeepsOrder and writes all that is queued by the time that Close returns.
func TestWriterKeepsOrder(t *testing.T) {
	var out bytes.Buffer
	w := NewWriter(&out, neverFails(t))
	const n = writerQueue // that many always fit
	for i := range n {
		w.Record(record(i))
	}
	w.Close()
	w.Close() // does nothing
	got := ids(t, out.Bytes())
	if len(got) != n || w.Lost() != 0 {
		t.Fatalf("%d lines, %d lost, want %d and 0", len(got), w.Lost(), n)
	}
	for i, id := range got {
		if id != fmt.Sprint(i) {
			t.Fatalf("line %d is record %s", i, id)
		}
	}
}

// TestWriterLosesRatherThanWaits: Record returns while nothing is written, and what
// does not fit is counted; the oldest are kept.
func TestWriterLosesRatherThanWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		gate := make(chan struct{})
		w := NewWriter(writerFunc(func(p []byte) (int, error) {
			<-gate
			return out.Write(p)
		}), neverFails(t))
		w.Record(record(-1))
		synctest.Wait() // it is being written now, and out of the queue
		const lost = 10
		for i := range writerQueue + lost {
			w.Record(record(i))
		}
		if w.Lost() != lost {
			t.Errorf("%d lost, want %d", w.Lost(), lost)
		}
		close(gate)
		w.Close()
		got := ids(t, out.Bytes())
		if len(got) != writerQueue+1 || got[len(got)-1] != fmt.Sprint(writerQueue-1) {
			t.Errorf("%d lines, the last %s", len(got), got[len(got)-1])
		}
	})
}

// TestWriterReportsFailures once for each streak of them, and counts every record.
func TestWriterReportsFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		full := errors.New("disk full")
		fail := map[int]bool{1: true, 2: true, 3: true, 5: true}
		n := -1
		var heard []error
		w := NewWriter(writerFunc(func(p []byte) (int, error) {
			if n++; fail[n] {
				return 0, full
			}
			return out.Write(p)
		}), func(err error) { heard = append(heard, err) })
		for i := range 7 {
			w.Record(record(i))
			time.Sleep(2 * writerRest) // each is written by itself
		}
		w.Close()
		if len(heard) != 2 || !errors.Is(heard[0], full) || !errors.Is(heard[1], full) {
			t.Errorf("heard %v, want two", heard)
		}
		if got := strings.Join(ids(t, out.Bytes()), " "); got != "0 4 6" || w.Lost() != 4 {
			t.Errorf("wrote %s, lost %d", got, w.Lost())
		}
	})
}

// TestWriterStartsANewLineAfterHalfAOne: a full disk may take the start of a line, and of
// several that are written at once.
func TestWriterStartsANewLineAfterHalfAOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		n := 0
		w := NewWriter(writerFunc(func(p []byte) (int, error) {
			switch n++; n {
			case 2:
				k, _ := out.Write(p[:bytes.IndexByte(p, '\n')+7])
				return k, io.ErrShortWrite
			case 3:
				return 0, io.ErrShortWrite // still full
			}
			return out.Write(p)
		}), func(error) {})
		w.Record(record(0))
		time.Sleep(writerRest / 2)
		for i := 1; i < 4; i++ { // while it rests: one write, of which 2 and 3 are lost
			w.Record(record(i))
		}
		for i := 4; i < 7; i++ { // 4 is lost
			time.Sleep(2 * writerRest)
			w.Record(record(i))
		}
		w.Close()
		var valid []string
		for line := range strings.Lines(out.String()) {
			var l Line
			if json.Unmarshal([]byte(line), &l) == nil {
				valid = append(valid, l.FlowID)
			}
		}
		if got := strings.Join(valid, " "); got != "0 1 5 6" || w.Lost() != 3 {
			t.Errorf("whole lines %s, lost %d\n%s", got, w.Lost(), &out)
		}
	})
}

// TestWriterWakesUpForMany: records that come while it rests are one write.
func TestWriterWakesUpForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		writes, lines := 0, 0
		w := NewWriter(writerFunc(func(p []byte) (int, error) {
			writes++
			lines += bytes.Count(p, []byte{'\n'})
			return len(p), nil
		}), neverFails(t))
		const n = 1000
		for i := range n {
			w.Record(record(i))
			time.Sleep(writerRest / 10)
		}
		w.Close()
		if lines != n || writes > n/10+2 {
			t.Errorf("%d lines in %d writes", lines, writes)
		}
	})
}

// TestWriterCloseDoesNotWaitForEver for somebody who has stopped reading.
func TestWriterCloseDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		w := NewWriter(writerFunc(func(p []byte) (int, error) {
			<-gate
			return len(p), nil
		}), neverFails(t))
		w.Record(record(0))
		start := time.Now()
		w.Close()
		if d := time.Since(start); d != closeGrace {
			t.Errorf("Close took %v", d)
		}
		close(gate)
		<-w.done
	})
}

// TestTee gives every sink every record.
func TestTee(t *testing.T) {
	var a, b keep
	both := Tee{&a, &b}
	both.Record(record(1))
	both.Record(record(2))
	if a.ids() != "1 2" || b.ids() != "1 2" {
		t.Errorf("got %q and %q", a.ids(), b.ids())
	}
}

// keep is a Sink.
type keep struct {
	mu      sync.Mutex
	records []*symbolonv1.FlowRecord
}

func (k *keep) Record(r *symbolonv1.FlowRecord) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.records = append(k.records, r)
}

func (k *keep) ids() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return flowIDs(k.records)
}

func flowIDs(records []*symbolonv1.FlowRecord) string {
	var out []string
	for _, r := range records {
		out = append(out, r.GetFlowId())
	}
	return strings.Join(out, " ")
}
