package netlab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// A world's id is sl-<pid>-<start time>-<8 hex digits>. Everything a world makes
// outside of itself (namespace, cgroup, temporary directory) is named by the id,
// or by the id, a dash and more; so a later process can tell whose it is.
var (
	worldName = regexp.MustCompile(`^(sl-([0-9]+)-([0-9]+)-[0-9a-f]{8})(?:$|-)`)
	hostName  = regexp.MustCompile(`^[a-z][a-z0-9-]{0,30}$`)
)

// owner is the process that made a world. The start time (clock ticks since
// boot, field 22 of /proc/PID/stat) tells it from a later process with its pid.
type owner struct {
	pid   int
	start uint64
}

func self() (owner, error) {
	start, err := startTime(os.Getpid())
	if err != nil {
		return owner{}, err
	}
	return owner{os.Getpid(), start}, nil
}

// newID returns a fresh world id of this process.
func (o owner) newID() string {
	var b [4]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return fmt.Sprintf("sl-%d-%d-%s", o.pid, o.start, hex.EncodeToString(b[:]))
}

// alive reports whether the process still runs. An error reading /proc counts as
// alive: what is not known to be dead is left alone.
func (o owner) alive() bool {
	start, err := startTime(o.pid)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	return err != nil || start == o.start
}

// parseName splits the name of something a world made into the world's id and
// its owner.
func parseName(name string) (id string, o owner, ok bool) {
	m := worldName.FindStringSubmatch(name)
	if m == nil {
		return "", owner{}, false
	}
	pid, err := strconv.Atoi(m[2])
	if err != nil {
		return "", owner{}, false
	}
	start, err := strconv.ParseUint(m[3], 10, 64)
	if err != nil {
		return "", owner{}, false
	}
	return m[1], owner{pid, start}, true
}

// startTime reads field 22 of /proc/PID/stat. The error is fs.ErrNotExist for a
// process that is gone or a zombie (dead, not yet reaped).
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Field 2 is the command in parentheses and may itself hold ") ".
	s := string(stat)
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, fmt.Errorf("malformed /proc/%d/stat", pid)
	}
	f := strings.Fields(s[i+1:]) // f[0] is field 3, the state
	if len(f) < 20 {
		return 0, fmt.Errorf("malformed /proc/%d/stat", pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseUint(f[19], 10, 64)
}
