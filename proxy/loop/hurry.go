package loop

import (
	"time"

	"golang.org/x/sys/unix"
)

// Hurry delivers to near what has come from far already, on the time of whoever calls: a
// loop may have to be woken up first. It does not wait, and is to be called before Add.
// What near does not take is left for the loop, and so is an error.
func (r *Relay) Hurry() {
	if r.far.fd < 0 || r.cut.Load() { // a Tunnel's loop is awake; cut, it must not carry a byte
		return
	}
	d := &r.down
	none := r.ToNear.Load() == 0
	if err := d.hurry(); err != nil {
		why := err // or every err would be on the heap
		r.why.Store(&why)
	}
	if none && r.ToNear.Load() > 0 {
		r.FirstToNear.Store(time.Now().UnixNano())
	}
}

func (d *direction) hurry() error {
	if early := d.pending; !early.empty() {
		d.pending = store{}
		err := d.put(early.data)
		early.drop()
		if err != nil {
			return err
		}
	}
	src := d.src
	if src.stream == nil {
		return nil
	}
	var data [4][]byte
	var vec [len(data)]unix.Iovec
	rest, n, err := d.unseal(src.carry.data, data[:0], vec[:])
	d.count.Add(uint64(n))
	if err != nil {
		return err
	}
	src.carry.taken(len(src.carry.data) - len(rest))
	src.readable = d.eof // what is in the socket still, or comes, has an event
	return nil
}
