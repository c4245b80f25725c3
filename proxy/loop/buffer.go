package loop

import (
	"sync"

	"github.com/symbolon/symbolon/mtls/record"
)

const (
	// readSize is how much one read takes at most where much flows, bytes: with two
	// such buffers a loop stays within a core's cache.
	readSize = 128 << 10
	// smallRead is how much it takes where little does. What a slow receiver does not
	// take has to be kept, so a read is not larger than the flow has shown to need.
	smallRead = 16 << 10
	// slots is how many records are sealed at a time.
	slots = 8
	// inSize holds an incomplete record and a read.
	inSize = readSize + record.MaxRecord
	// inSmall holds an incomplete record and a little more.
	inSmall = 20 << 10
)

// sizes of buffers in which bytes wait, the smallest that fits is taken.
var pools = [...]struct {
	size int
	pool *sync.Pool
}{
	pool(2 << 10), pool(20 << 10), pool(72 << 10), pool(inSize),
}

func pool(size int) struct {
	size int
	pool *sync.Pool
} {
	return struct {
		size int
		pool *sync.Pool
	}{size, &sync.Pool{New: func() any { b := make([]byte, size); return &b }}}
}

// store is bytes that wait, in a buffer that is there as long as they are. The zero
// value is empty.
type store struct {
	buf  *[]byte
	data []byte // of buf
}

func (s *store) empty() bool { return len(s.data) == 0 }

// add appends a copy of b.
func (s *store) add(b []byte) {
	if len(b) == 0 {
		return
	}
	if s.buf == nil || len(s.data)+len(b) > cap(s.data) {
		grown := newStore(len(s.data) + len(b))
		grown.data = append(grown.data, s.data...)
		s.drop()
		*s = grown
	}
	s.data = append(s.data, b...)
}

// newStore has room for n bytes.
func newStore(n int) store {
	for i := range pools {
		if n <= pools[i].size {
			b := pools[i].pool.Get().(*[]byte)
			return store{b, (*b)[:0]}
		}
	}
	b := make([]byte, n)
	return store{&b, b[:0]}
}

// taken takes the first n bytes away.
func (s *store) taken(n int) {
	if s.data = s.data[n:]; len(s.data) == 0 {
		s.drop()
	}
}

// drop gives the buffer back.
func (s *store) drop() {
	if s.buf != nil {
		for i := range pools {
			if len(*s.buf) == pools[i].size {
				pools[i].pool.Put(s.buf)
				break
			}
		}
	}
	*s = store{}
}
