package loop

import (
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/mtls/record"
)

// pump carries d's bytes until src has none, dst takes none, or it has had its turn.
func (l *Loop) pump(d *direction) {
	d.spent = 0
	for !d.relay.over {
		switch {
		case !l.flush(d):
			return
		case d.ended:
			l.half(d)
			return
		case d.eof:
			l.end(d)
			continue
		case !d.src.readable:
			return
		case d.spent >= budget:
			l.later(d)
			return
		}
		var n int
		var err error
		switch {
		case d.dst.stream != nil:
			n, err = l.seal(d)
		case d.src.stream != nil:
			n, err = l.open(d)
		default:
			n, err = l.copy(d)
		}
		if err != nil {
			l.finish(d.relay, err)
			return
		}
		if n > 0 {
			l.moved(d, n)
		}
	}
}

func (l *Loop) moved(d *direction, n int) {
	if d.count.Add(uint64(n)) == uint64(n) {
		d.first.Store(l.now)
	}
}

// flush writes what waits. False: dst does not take all of it now, or the relay is
// over.
func (l *Loop) flush(d *direction) bool {
	for !d.pending.empty() {
		n, err := write(d.dst.fd, d.pending.data)
		if err == errAgain { //nolint:errorlint // one value, made for this
			return false
		}
		if err != nil {
			l.finish(d.relay, err)
			return false
		}
		d.pending.taken(n)
	}
	return d.pipe == nil || l.drain(d)
}

// flushed tells whether nothing waits.
func (d *direction) flushed() bool { return d.pending.empty() && d.pipe == nil }

// put writes b to dst, and keeps what it does not take.
func (d *direction) put(b []byte) error {
	if d.pending.empty() {
		n, err := write(d.dst.fd, b)
		if err != nil && err != errAgain { //nolint:errorlint // one value, made for this
			return err
		}
		b = b[n:]
	}
	d.pending.add(b)
	return nil
}

// read is one read from src: n bytes of b. 0: there is nothing now, or d has ended.
func (d *direction) read(n int, err error, asked int) (int, error) {
	switch {
	case err == errAgain: //nolint:errorlint // one value, made for this
		d.src.readable = false
		d.much = false
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0:
		d.eof = true
	case n < asked:
		// A stream that gives less than asked for has no more, but for its end, and what
		// stands behind an urgent byte.
		d.src.readable = d.src.greedy
	}
	d.spent += n
	d.much = n >= min(asked, smallRead)
	return n, nil
}

// size is how much to ask for.
func (d *direction) size() int {
	if d.much {
		return readSize
	}
	return smallRead
}

// seal carries application bytes into a tunnel: read into the slots of records,
// sealed in place, written at once.
func (l *Loop) seal(d *direction) (int, error) {
	lead := d.dst.stream.Lead()
	asked := record.SlotData - lead
	var got int
	var err error
	if d.much {
		l.vec[0].Base = &l.out[record.SlotsAt+lead]
		l.vec[0].SetLen(asked)
		for i := 1; i < slots; i++ {
			l.vec[i].Base = &l.out[record.SlotsAt+i*record.SlotStride]
			l.vec[i].SetLen(record.SlotData)
		}
		asked += (slots - 1) * record.SlotData
		got, err = readv(d.src.fd, l.vec[:slots])
	} else {
		got, err = read(d.src.fd, l.out[record.SlotsAt+lead:][:asked])
	}
	if got, err = d.read(got, err, asked); got == 0 || err != nil {
		return 0, err
	}
	b, err := d.dst.stream.Seal(l.out, got)
	if err != nil {
		return 0, err
	}
	if !d.src.greedy || got == asked {
		return got, d.put(b)
	}
	l.moved(d, got)
	return 0, l.sealLast(d, b)
}

// sealLast writes b, which is sealed, and the end along with it where src has ended by
// now: one packet, and one thing to wake up for, where an application answers and closes.
func (l *Loop) sealLast(d *direction, b []byte) error {
	n, broken := peek(d.src.fd)
	switch {
	case broken == errAgain: //nolint:errorlint // one value, made for this
		broken, d.src.readable = nil, false
	case broken == nil && n == 0:
		end, err := d.dst.stream.End(l.in)
		if err != nil {
			return err
		}
		b = append(b, end...)
		d.eof, d.ended = true, true
	}
	if err := d.put(b); err != nil {
		return err
	}
	return broken // which the socket tells only once
}

// open carries a tunnel's records to the application: read, opened in place, written
// at once.
func (l *Loop) open(d *direction) (int, error) {
	src := d.src
	have := copy(l.in, src.carry.data)
	src.carry.drop()
	got := 0
	// What was read before the relay began may leave little room, or none.
	if src.read {
		src.read, src.readable = false, false
	} else if asked := min(d.size(), len(l.in)-have); asked > 0 {
		n, err := read(src.fd, l.in[have:have+asked])
		if got, err = d.read(n, err, asked); err != nil {
			return 0, err
		}
	}
	fin := d.eof // TCP's, which is not the data phase's
	d.eof = false
	in, total, err := d.unseal(l.in[:have+got], l.data[:0], l.vec[:])
	if err != nil {
		return total, err
	}
	if fin && !d.eof {
		return total, mtls.ErrTruncated
	}
	src.carry.add(in)
	return total, nil
}

// unseal opens the records in in, in place, and gives dst what is in them: by as many slices at
// a time as data has capacity, and vec length. rest is what is not complete yet, or stands
// behind the end.
func (d *direction) unseal(in []byte, data [][]byte, vec []unix.Iovec) (rest []byte, total int, err error) {
	for {
		n, opened, err := d.src.stream.Open(in, data)
		in = in[n:]
		sum, werr := d.gather(opened, vec)
		total += sum
		if werr != nil {
			return in, total, werr
		}
		if isEnd(err) {
			d.eof = true
			return in, total, nil
		}
		if err != nil || n == 0 && len(opened) == 0 {
			return in, total, err
		}
	}
}

// gather writes slices, by vec, to dst, and keeps what it does not take. n is their size.
func (d *direction) gather(data [][]byte, vec []unix.Iovec) (n int, err error) {
	switch len(data) {
	case 0:
		return 0, nil
	case 1:
		return len(data[0]), d.put(data[0])
	}
	for i, b := range data {
		vec[i].Base = &b[0]
		vec[i].SetLen(len(b))
		n += len(b)
	}
	took := 0
	if d.pending.empty() {
		took, err = writev(d.dst.fd, vec[:len(data)])
		if err != nil && err != errAgain { //nolint:errorlint // one value, made for this
			return n, err
		}
	}
	if took == n {
		return n, nil
	}
	if d.pending.buf == nil {
		d.pending = newStore(n - took)
	}
	for _, b := range data {
		skip := min(took, len(b))
		took -= skip
		d.pending.add(b[skip:])
	}
	return n, nil
}

// copy carries bytes between two plain sockets: through the buffer while there are
// few, through a pipe once they fill it.
func (l *Loop) copy(d *direction) (int, error) {
	if d.bulk {
		if p := l.pipe(); p != nil {
			return l.splice(d, p)
		}
	}
	asked := d.size()
	n, err := read(d.src.fd, l.in[:asked])
	if n, err = d.read(n, err, asked); n == 0 || err != nil {
		return 0, err
	}
	d.bulk = n == readSize
	return n, d.put(l.in[:n])
}

// tell seals r's control messages. They wait behind what far has not taken yet.
func (l *Loop) tell(r *Relay) {
	r.mu.Lock()
	told := r.told
	r.told = nil
	r.mu.Unlock()
	for _, m := range told {
		if r.over || r.far.stream == nil {
			return
		}
		b, err := r.far.stream.SealControl(l.out, m)
		if err == nil && b != nil {
			err = r.up.put(b)
		}
		if err != nil {
			l.finish(r, err)
		}
	}
}

// end tells dst that d has ended.
func (l *Loop) end(d *direction) {
	d.ended = true
	if other := d.dst.reads; d.dst.stream == nil && other.ended && other.flushed() {
		return // closing says it, which comes now: nothing is left to be read either
	}
	if d.dst.stream == nil {
		if err := unix.Shutdown(d.dst.fd, unix.SHUT_WR); err != nil {
			l.finish(d.relay, gone(d.dst.fd, err))
		}
		return
	}
	b, err := d.dst.stream.End(l.out)
	if err == nil {
		err = d.put(b)
	}
	if err != nil {
		l.finish(d.relay, err)
	}
}

// half ends the relay, when both directions have ended and nothing waits.
func (l *Loop) half(d *direction) {
	r := d.relay
	if r.up.ended && r.down.ended && r.up.flushed() && r.down.flushed() {
		l.finish(r, nil)
		return
	}
	r.half.Store(true)
}
