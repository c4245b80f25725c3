package identity

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// userDB reads passwd(5) and group(5) and nothing else: no NSS, so that no
// directory server is asked (or can stall us) while a connection waits. It reads
// them again when they change. Safe for concurrent use.
type userDB struct {
	passwd, group string
	// fresh is for how long the files are not looked at again: a busy host would do
	// nothing else.
	fresh time.Duration

	mu     sync.Mutex
	looked time.Time
	stamp  [2]fileStamp
	users  map[uint32]user
	serial uint64 // counts the readings
}

// usersFresh is how late a change of users and groups may count.
const usersFresh = 100 * time.Millisecond

type user struct {
	name   string
	groups []string // sorted
}

type fileStamp struct {
	size  int64
	mtime time.Time
}

// lookup finds a user by number; the zero user if there is none. serial changes
// when any answer may have changed.
func (db *userDB) lookup(uid uint32) (u user, serial uint64, err error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.refresh(); err != nil {
		return user{}, 0, fmt.Errorf("user database: %w", err)
	}
	return db.users[uid], db.serial, nil
}

// refresh reads the files again if they have changed. The caller holds the mutex.
func (db *userDB) refresh() error {
	now := time.Now()
	if db.users != nil && now.Sub(db.looked) < db.fresh {
		return nil
	}
	var stamp [2]fileStamp
	for i, name := range [...]string{db.passwd, db.group} {
		st, err := os.Stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a host without names: numbers are all there is
		}
		if err != nil {
			return err
		}
		stamp[i] = fileStamp{st.Size(), st.ModTime()}
	}
	if db.users == nil || stamp != db.stamp {
		users, err := readUsers(db.passwd, db.group)
		if err != nil {
			return err
		}
		db.users, db.stamp = users, stamp
		db.serial++
	}
	db.looked = now
	return nil
}

func readUsers(passwd, group string) (map[uint32]user, error) {
	users := make(map[uint32]user)
	byName := make(map[string]uint32)
	primary := make(map[uint32][]uint32) // gid to uids
	err := eachRecord(passwd, 4, func(f []string) {
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return
		}
		// Of several names for one number the first counts, as in getpwuid(3).
		if _, ok := users[uint32(uid)]; ok {
			return
		}
		users[uint32(uid)] = user{name: f[0]}
		byName[f[0]] = uint32(uid)
		primary[uint32(gid)] = append(primary[uint32(gid)], uint32(uid))
	})
	if err != nil {
		return nil, err
	}
	err = eachRecord(group, 3, func(f []string) {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			return
		}
		members := slices.Clone(primary[uint32(gid)])
		if len(f) > 3 {
			for name := range strings.SplitSeq(f[3], ",") {
				if uid, ok := byName[strings.TrimSpace(name)]; ok {
					members = append(members, uid)
				}
			}
		}
		for _, uid := range members {
			u := users[uid]
			if i, found := slices.BinarySearch(u.groups, f[0]); !found {
				u.groups = slices.Insert(u.groups, i, f[0])
				users[uid] = u
			}
		}
	})
	return users, err
}

// eachRecord gives the fields of each line that has at least n of them. Lines that
// begin with + or - are NIS's and no users.
func eachRecord(name string, n int, each func(fields []string)) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // a group of many members is one line
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < n || fields[0] == "" || strings.ContainsAny(fields[0][:1], "+-#") {
			continue
		}
		each(fields)
	}
	return lines.Err()
}
