package identity

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

const (
	// maxExecutable bounds the work that a local user can cause by running a large
	// sparse file: beyond it there is no proc.exe_sha256. So much takes about half a
	// second.
	maxExecutable = 256 << 20
	// maxHashing is how many files are read at a time, and maxHashingPerUser how many
	// of those for the processes of one user.
	maxHashing, maxHashingPerUser = 16, 2
	// maxAttempts counts how often others may spoil ours.
	maxAttempts = 3
	// hashChunk is read between two looks at the clock.
	hashChunk = 256 << 10
)

// errChanged: the process runs another file than a moment ago.
var errChanged = errors.New("executable changed meanwhile")

// executables knows the SHA-256 of executables, each read once per version.
type executables struct {
	sums   *lru.Cache[FileID, string]
	flight singleflight.Group
	slots  *shares
}

func newExecutables(size int) *executables {
	return &executables{sums: newLRU[FileID, string](size), slots: newShares(maxHashing, maxHashingPerUser)}
}

// sum returns the lower-case hexadecimal SHA-256 of what p runs, known to be id;
// "" if it is too large. uid is whose process it is.
func (x *executables) sum(ctx context.Context, p *process, id FileID, uid uint32) (string, error) {
	if id.Size > maxExecutable {
		return "", nil
	}
	for attempt := 1; ; attempt++ {
		if s, ok := x.sums.Get(id); ok {
			return s, nil
		}
		// Each user's own: what stands in one's queue is not waited for by another.
		v, err, shared := x.flight.Do(fmt.Sprint(uid, id), func() (any, error) {
			s, err := x.read(ctx, p, id, uid)
			if err == nil {
				x.sums.Add(id, s)
			}
			return s, err
		})
		if err == nil {
			return v.(string), nil
		}
		// What ended another caller's attempt (his deadline, his process) says nothing
		// about ours.
		if !shared || attempt == maxAttempts || ctx.Err() != nil {
			return "", err
		}
	}
}

func (x *executables) read(ctx context.Context, p *process, id FileID, uid uint32) (string, error) {
	release, err := x.slots.acquire(ctx, uid)
	if err != nil {
		return "", err
	}
	defer release()
	f, err := p.openExe()
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The process may have called execve since: what is open counts.
	opened, err := statFile(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return "", err
	}
	if opened != id {
		return "", errChanged
	}
	h := sha256.New()
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		_, err := io.CopyN(h, f, hashChunk)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", os.NewSyscallError("read", err)
		}
	}
}
