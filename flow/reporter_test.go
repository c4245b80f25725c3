package flow

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

var errAway = errors.New("no route to the controller")

// controller is the other end of a Reporter: it takes batches, or fails as answer
// says.
type controller struct {
	mu      sync.Mutex
	answer  func(*symbolonv1.ReportFlowsRequest) error // nil: always well
	calls   int
	batches []*symbolonv1.ReportFlowsRequest // those that arrived
}

func (c *controller) send(_ context.Context, r *symbolonv1.ReportFlowsRequest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if c.answer != nil {
		if err := c.answer(r); err != nil {
			return err
		}
	}
	c.batches = append(c.batches, r)
	return nil
}

func (c *controller) called() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls
}

// arrived are all records that arrived, in order, and the losses that were told.
func (c *controller) arrived() (records []*symbolonv1.FlowRecord, lost uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.batches {
		records = append(records, b.GetRecords()...)
		lost += b.GetLost()
	}
	return records, lost
}

// drain flushes as Run does at a tick.
func drain(r *Reporter) {
	for r.flush(context.Background()) {
	}
}

func inOrder(t *testing.T, records []*symbolonv1.FlowRecord, first, n int) {
	t.Helper()
	if len(records) != n {
		t.Fatalf("%d records, want %d", len(records), n)
	}
	for i, r := range records {
		if want := fmt.Sprint(first + i); r.GetFlowId() != want {
			t.Fatalf("record %d is %s, want %s", i, r.GetFlowId(), want)
		}
	}
}

func TestReporterBoundsBatchesByCount(t *testing.T) {
	c := &controller{}
	r := NewReporter(c.send)
	const n = 2*reporterBatch + 5
	for i := range n {
		r.Record(record(i))
	}
	drain(r)
	records, lost := c.arrived()
	inOrder(t, records, 0, n)
	if len(c.batches) != 3 || len(c.batches[0].GetRecords()) != reporterBatch || lost != 0 || r.Lost() != 0 {
		t.Errorf("%d batches, the first of %d, %d lost", len(c.batches), len(c.batches[0].GetRecords()), lost)
	}
}

func TestReporterBoundsBatchesByBytes(t *testing.T) {
	c := &controller{}
	r := NewReporter(c.send)
	big := strings.Repeat("x", reporterBytes/4)
	const n = 10
	for i := range n {
		x := record(i)
		x.Detail = big
		r.Record(x)
	}
	whale := record(n) // larger than a batch: it goes alone
	whale.Detail = strings.Repeat("x", reporterBytes+1)
	r.Record(whale)
	r.Record(record(n + 1))
	drain(r)
	records, _ := c.arrived()
	inOrder(t, records, 0, n+2)
	for i, b := range c.batches {
		if size := proto.Size(b); size > reporterBytes+100 && len(b.GetRecords()) > 1 {
			t.Errorf("batch %d: %d bytes in %d records", i, size, len(b.GetRecords()))
		}
	}
	if len(c.batches) < 4 || len(c.batches) > 6 {
		t.Errorf("%d batches", len(c.batches))
	}
}

// TestReporterWaitsForTheController: nothing is lost or reordered while it is away for
// a moment, and it is not asked in a loop.
func TestReporterWaitsForTheController(t *testing.T) {
	away := true
	c := &controller{answer: func(*symbolonv1.ReportFlowsRequest) error {
		if away {
			return errAway
		}
		return nil
	}}
	r := NewReporter(c.send)
	for i := range 3 * reporterBatch {
		r.Record(record(i))
		if i%reporterBatch == 0 {
			drain(r)
		}
	}
	if c.calls != 3 {
		t.Errorf("%d calls for 3 ticks", c.calls)
	}
	away = false
	drain(r)
	records, lost := c.arrived()
	inOrder(t, records, 0, 3*reporterBatch)
	if lost != 0 || r.Lost() != 0 {
		t.Errorf("%d lost", lost)
	}
}

// TestReporterKeepsTheNewest when the controller is away for long, and tells with the
// next report how many are missing.
func TestReporterKeepsTheNewest(t *testing.T) {
	away := true
	c := &controller{answer: func(*symbolonv1.ReportFlowsRequest) error {
		if away {
			return errAway
		}
		return nil
	}}
	r := NewReporter(c.send)
	const over = 3*reporterBatch + 7
	for i := range reporterQueue + over {
		r.Record(record(i))
		if i%5000 == 0 {
			drain(r)
		}
		if len(r.queue) > reporterQueue {
			t.Fatalf("%d records are kept, at most %d", len(r.queue), reporterQueue)
		}
	}
	gone := r.Lost()
	if gone < over || gone >= over+reporterBatch {
		t.Errorf("%d lost, want at least %d and less than a batch more", gone, over)
	}
	away = false
	drain(r)
	records, lost := c.arrived()
	inOrder(t, records, int(gone), reporterQueue+over-int(gone))
	if lost != gone {
		t.Errorf("the controller heard of %d lost, want %d", lost, gone)
	}
	if c.batches[0].GetLost() != gone {
		t.Error("the loss did not travel with the first report")
	}
}

// TestReporterPutsBackWithinTheBound: records that came while a report was under way
// are newer than those in it.
func TestReporterPutsBackWithinTheBound(t *testing.T) {
	var r *Reporter
	c := &controller{}
	c.answer = func(*symbolonv1.ReportFlowsRequest) error {
		if c.calls > 1 {
			return nil
		}
		for i := range reporterQueue - 10 {
			r.Record(record(reporterBatch + i))
		}
		return errAway
	}
	r = NewReporter(c.send)
	for i := range reporterBatch {
		r.Record(record(i))
	}
	drain(r)
	if len(r.queue) != reporterQueue || r.Lost() != reporterBatch-10 {
		t.Fatalf("%d kept, %d lost", len(r.queue), r.Lost())
	}
	drain(r)
	records, lost := c.arrived()
	inOrder(t, records, reporterBatch-10, reporterQueue)
	if lost != reporterBatch-10 {
		t.Errorf("the controller heard of %d lost", lost)
	}
}

// refuses answers as a controller does that cannot read the records which bad holds.
func refuses(bad ...string) func(*symbolonv1.ReportFlowsRequest) error {
	return func(b *symbolonv1.ReportFlowsRequest) error {
		for _, r := range b.GetRecords() {
			for _, id := range bad {
				if r.GetFlowId() == id {
					return fmt.Errorf("%w: record %s", ErrUnacceptable, id)
				}
			}
		}
		return nil
	}
}

// TestReporterDropsTheOneBadRecord wherever in the queue it stands; the others
// arrive, in order.
func TestReporterDropsTheOneBadRecord(t *testing.T) {
	const n = reporterBatch + 100
	for _, bad := range []int{0, 1, 500, reporterBatch - 1, reporterBatch, n - 1} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			c := &controller{answer: refuses(fmt.Sprint(bad))}
			r := NewReporter(c.send)
			for i := range n {
				r.Record(record(i))
			}
			drain(r)
			drain(r)
			records, lost := c.arrived()
			inOrder(t, records[:bad], 0, bad)
			inOrder(t, records[bad:], bad+1, n-1-bad)
			if r.Lost() != 1 {
				t.Errorf("%d lost", r.Lost())
			}
			if lost != 1 {
				t.Errorf("the controller heard of %d lost", lost)
			}
			if c.calls > 40 {
				t.Errorf("%d calls to find one record among %d", c.calls, n)
			}
		})
	}
}

// TestReporterSurvivesBadRecordsOnly: each is tried alone at most once after the
// first was found, and the end of the queue is the end of it.
func TestReporterSurvivesBadRecordsOnly(t *testing.T) {
	c := &controller{answer: func(b *symbolonv1.ReportFlowsRequest) error {
		if len(b.GetRecords()) > 0 {
			return ErrUnacceptable
		}
		return nil
	}}
	r := NewReporter(c.send)
	const n = 300
	for i := range n {
		r.Record(record(i))
	}
	drain(r)
	if r.Lost() != n || len(r.queue) != 0 {
		t.Errorf("%d lost, %d kept", r.Lost(), len(r.queue))
	}
	if c.calls > n+12 {
		t.Errorf("%d calls for %d records", c.calls, n)
	}
	drain(r)
	if _, lost := c.arrived(); lost != n {
		t.Errorf("the controller heard of %d lost", lost)
	}
}

// TestReporterRefusedLossAlone: a report of nothing but a loss, refused, is not lost,
// nor tried in a loop.
func TestReporterRefusedLossAlone(t *testing.T) {
	c := &controller{answer: func(*symbolonv1.ReportFlowsRequest) error { return ErrUnacceptable }}
	r := NewReporter(c.send)
	r.lost, r.total = 5, 5
	drain(r)
	if c.calls != 1 || r.Lost() != 5 {
		t.Errorf("%d calls, %d lost", c.calls, r.Lost())
	}
	c.answer = nil
	drain(r)
	if _, lost := c.arrived(); lost != 5 {
		t.Errorf("the controller heard of %d lost", lost)
	}
}

// TestReporterRun reports once a second, says nothing when there is nothing, and sends
// the rest at the end.
func TestReporterRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &controller{}
		r := NewReporter(c.send)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx, time.Second); close(done) }()
		r.Record(record(0))
		r.Record(record(1))
		time.Sleep(reportEvery - time.Millisecond)
		synctest.Wait()
		if n := c.called(); n != 0 {
			t.Error("reported at once: records could not travel together")
		}
		time.Sleep(10 * reportEvery)
		synctest.Wait()
		if records, _ := c.arrived(); c.called() != 1 || flowIDs(records) != "0 1" {
			t.Errorf("%d calls, and %v", c.called(), records)
		}
		for i := range 2 * reporterBatch {
			r.Record(record(2 + i))
		}
		cancel()
		<-done
		records, _ := c.arrived()
		inOrder(t, records, 0, 2+2*reporterBatch)
	})
}

// TestReporterRunEndsWithinGrace, also where the controller does not answer; and a
// report that the end interrupts is sent again.
func TestReporterRunEndsWithinGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const grace = 2 * time.Second
		var deadlines []time.Duration
		r := NewReporter(func(ctx context.Context, b *symbolonv1.ReportFlowsRequest) error {
			if d, ok := ctx.Deadline(); ok {
				deadlines = append(deadlines, time.Until(d))
			}
			if flowIDs(b.GetRecords()) != "0" {
				t.Errorf("sent %v", b)
			}
			<-ctx.Done()
			return ctx.Err()
		})
		r.Record(record(0))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx, grace); close(done) }()
		time.Sleep(2 * reportEvery)
		synctest.Wait()
		start := time.Now()
		cancel()
		<-done
		if d := time.Since(start); d != grace {
			t.Errorf("ended after %v, want %v", d, grace)
		}
		if len(deadlines) != 1 || deadlines[0] != grace {
			t.Errorf("deadlines %v, want one of %v", deadlines, grace)
		}
	})
}
