package identity

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Attributes of a single process, which the processes of one workload do not share.
// They are there only where they are asked for, since every value makes a workload of
// its own, with a key and an SVID of its own.
const (
	// AttrArgs are the process's arguments with a space between them. They are the
	// process's own word: any process can overwrite its own at any time, and whoever
	// starts a program chooses them.
	AttrArgs = "proc.args"
	// AttrStart is when it began, in hundredths of a second since the machine was
	// booted (field 22 of /proc/PID/stat).
	AttrStart = "proc.start"
	// AttrParentUnit is the system unit of its parent, or of the ancestor that adopted
	// it. None where that is systemd, which adopts every orphan.
	AttrParentUnit = "proc.parent_unit"
)

// OnRequest are the keys of those attributes, sorted.
func OnRequest() []string { return []string{AttrArgs, AttrParentUnit, AttrStart} }

// maxArgs is what an attribute's value may be long, bytes. Longer arguments are left
// out: a part of them could say the opposite of the whole.
const maxArgs = 1024

// asked are the values of the attributes on request that one process has.
type asked Attributes

// key tells sets of values apart; zero for none.
func (a asked) key() (k [16]byte) {
	if len(a) > 0 {
		h := Attributes(a).Hash()
		copy(k[:], h[:])
	}
	return k
}

// askedOf reads what is asked for of p. What a process does not have, it has not;
// errGone: it ended.
func (r *Resolver) askedOf(p *process) (asked, error) {
	var out Attributes
	for _, key := range r.asks {
		var value string
		var err error
		switch key {
		case AttrArgs:
			value, err = p.args()
		case AttrStart:
			var ticks uint64
			ticks, err = p.start()
			value = strconv.FormatUint(ticks, 10)
		case AttrParentUnit:
			value, err = r.parentUnit(p)
		}
		if err != nil {
			return nil, err
		}
		if value != "" {
			out = append(out, Attribute{key, value})
		}
	}
	return asked(out.normalize()), nil
}

// askedOfGone is what the kernel's record of a caller says of it, and no more.
func (r *Resolver) askedOfGone(c *Caller) asked {
	if slices.Contains(r.asks, AttrStart) {
		return asked{{AttrStart, strconv.FormatUint(c.Start/clockTick, 10)}}
	}
	return nil
}

// args is /proc/PID/cmdline, "" where it is too long or not text.
func (p *process) args() (string, error) {
	fd, err := unix.Openat(p.dir, "cmdline", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", procError("openat", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, maxArgs+2) // the last one ends in a zero byte
	n := 0
	for n < len(buf) {
		m, err := unix.Read(fd, buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", procError("read", err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	return joinArgs(buf[:n]), nil
}

func joinArgs(cmdline []byte) string {
	s := strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " ")
	if len(s) > maxArgs || !utf8.ValidString(s) || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return ""
	}
	return s
}

// parent is the number of p's parent now: field 4 of stat.
func (p *process) parent() (int, error) {
	fields, err := p.stat()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(fields[1]))
}

// parentUnit is AttrParentUnit of p.
//
// A process can get rid of its parent, and is then its next living subreaper's or
// systemd's; it cannot take one that is not its ancestor. So a value is proof, and its
// absence is none.
func (r *Resolver) parentUnit(p *process) (string, error) {
	pid, err := p.parent()
	if err != nil || pid <= 1 {
		return "", err
	}
	parent, err := openProcess(r.proc, pid)
	if errors.Is(err, errGone) {
		return "", nil // adopted meanwhile
	}
	if err != nil {
		return "", err
	}
	defer parent.close()
	v2, v1, err := parent.cgroups()
	if errors.Is(err, errGone) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// Still the parent: so it was what was opened, not a later bearer of its number.
	if again, err := p.parent(); err != nil || again != pid {
		return "", err
	}
	path := v2
	if v2 == "" || v2 == "/" {
		path = v1
	}
	cg := parseCgroup(path)
	if isManager(path) || cg.container != "" {
		return "", nil
	}
	return cg.unit, nil
}

// checkAsked refuses what is not on request. Errors name the keys that are.
func checkAsked(keys []string) error {
	for _, k := range keys {
		if !slices.Contains(OnRequest(), k) {
			return fmt.Errorf("attribute %q is not on request; only %s are", k, strings.Join(OnRequest(), ", "))
		}
	}
	return nil
}
