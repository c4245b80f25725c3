package record

import "sync"

const (
	// batchRecords is how many full records travel in one system call.
	batchRecords = 4
	slotSize     = maxPlaintext + overhead
	// smallSize serves requests and responses; bytes.
	smallSize = 4 << 10
	// largeSize takes a batch and the KeyUpdate between its records. Nine pages: the
	// allocator would round up to them anyway.
	largeSize = 72 << 10
	// maxSlices bounds what one writev(2) carries; UIO_MAXIOV is 1024.
	maxSlices = 64
)

// buffer is memory for records, from a pool, held only while there are bytes in it.
type buffer struct {
	data []byte
	// slices point into data; they are here so that a reader at rest has none.
	slices [maxSlices][]byte
}

var (
	small = sync.Pool{New: func() any { return &buffer{data: make([]byte, smallSize)} }}
	large = sync.Pool{New: func() any { return &buffer{data: make([]byte, largeSize)} }}
)

// getBuffer is for size bytes or more; at most largeSize.
func getBuffer(size int) *buffer {
	if size <= smallSize {
		return small.Get().(*buffer)
	}
	return large.Get().(*buffer)
}

// putBuffer gives b back; what Attach has made larger goes with the garbage.
func putBuffer(b *buffer) {
	switch len(b.data) {
	case smallSize:
		small.Put(b)
	case largeSize:
		large.Put(b)
	}
}
