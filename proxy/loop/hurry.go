package loop

import "time"

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
		r.why.Store(&err)
	}
	if none && r.ToNear.Load() > 0 {
		r.FirstToNear.Store(time.Now().UnixNano())
	}
}

func (d *direction) hurry() error {
	early := d.pending
	d.pending = store{}
	err := d.deliver(early.data)
	early.drop()
	if err != nil || d.src.stream == nil {
		return err
	}
	in := d.src.carry.data
	var some [4][]byte
	for {
		n, data, err := d.src.stream.Open(in, some[:0])
		in = in[n:]
		for _, b := range data {
			d.count.Add(uint64(len(b)))
			if err := d.deliver(b); err != nil {
				return err
			}
		}
		if err != nil && !isEnd(err) {
			return err
		}
		if d.eof = err != nil; d.eof || n == 0 && len(data) == 0 {
			break
		}
	}
	d.src.carry.taken(len(d.src.carry.data) - len(in))
	d.src.readable = d.eof // what is in the socket still, or comes, has an event
	return nil
}

// deliver writes b to dst, and keeps what that does not take.
func (d *direction) deliver(b []byte) error {
	if len(b) > 0 && d.pending.empty() {
		n, err := write(d.dst.fd, b)
		if err != nil && err != errAgain { //nolint:errorlint // one value, made for this
			return err
		}
		b = b[n:]
	}
	d.pending.add(b)
	return nil
}
