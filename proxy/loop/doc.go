// Package loop relays established connections: bytes between two sockets, one of
// which may carry a tunnel's TLS records, on a few event loops instead of goroutines.
// A connection at rest costs its state and no buffer, no stack and no timer.
//
//	loops, err := loop.Start(runtime.GOMAXPROCS(0), nil)
//	r := loop.New(near, far, done)     // two descriptors that nobody else uses
//	loops.Add(r)                       // done is called once, when both ended
//
// # How it works
//
// Each loop is a goroutine with an epoll instance of its own. A relay stays on the
// loop that it was given to, both descriptors registered once, edge-triggered, for
// all events: no epoll_ctl(2) while bytes flow. Whoever reads to the end of what is
// there, or writes until the kernel takes no more, waits for the next edge.
//
// A loop has one buffer to read into and one to seal in, which every relay uses in
// turn and leaves empty. What cannot be written is copied into a buffer from a pool
// and stays there until the receiver takes it; until then nothing more is read for
// it, so that backpressure reaches the sender, and a relay never holds more than one
// read's worth a direction. The incomplete record at the end of a read is kept in the
// same way.
//
// Records are opened and sealed where they lie, several for one read(2) and one
// writev(2), or one readv(2) and one write(2). Between two plain sockets splice(2) takes over
// once a read has filled its buffer, up to a MiB at a time.
//
// A relay may carry so much (see budget) before it has to let the others have their turn.
//
// A tunnel that is to serve again stays on its loop as a [Tunnel], registered as before:
//
//	k.Await(func(m []byte, err error) { ... })   // the next Open, or Verdict
//	err := k.Send(seal)                          // the other one
//	loops.Add(loop.Resume(near, k, done))
//
// # What is kept of TCP
//
// The end of one direction is passed on, behind all of its bytes, and the other goes
// on. A reset of one side resets the other. The end of a tunnel's stream without the
// end of its data phase is mtls.ErrTruncated, and resets. The urgent byte keeps its
// place and loses its mark.
package loop
