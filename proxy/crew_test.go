package proxy

import (
	"runtime"
	"sync"
	"testing"
)

func TestCrew(t *testing.T) {
	before := runtime.NumGoroutine()
	c := newCrew()
	// As many at once as one likes, and each once.
	const n = 10 * resting
	var started, ended sync.WaitGroup
	release := make(chan struct{})
	ran := make([]int, n)
	for i := range n {
		started.Add(1)
		ended.Add(1)
		c.run(func() {
			started.Done()
			<-release
			ran[i]++
			ended.Done()
		})
	}
	started.Wait()
	close(release)
	ended.Wait()
	for i, times := range ran {
		if times != 1 {
			t.Fatalf("%d ran %d times", i, times)
		}
	}
	eventually(t, "few are kept", func() bool { return runtime.NumGoroutine() <= before+resting })
	// The ones that rest serve again.
	eventually(t, "somebody rests", func() bool { return c.spare.Load() > 0 })
	for range n {
		done := make(chan struct{})
		c.run(func() { close(done) })
		<-done
	}
	c.close()
	eventually(t, "all are gone", func() bool { return runtime.NumGoroutine() <= before })
}
