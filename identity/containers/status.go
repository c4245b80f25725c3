package containers

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"
)

// State is how it is with a runtime.
type State string

// The states of a runtime.
const (
	// Unasked: there has been no container to ask for, or another runtime knew it sooner.
	Unasked State = "unasked"
	// Absent: nobody listens at the socket: the runtime is not installed, or does not run.
	Absent State = "absent"
	// Reachable: it has answered the last question.
	Reachable State = "reachable"
	// Unreachable: it is there, and could not be asked.
	Unreachable State = "unreachable"
)

// Status is how it was with one runtime when it was asked last, for encoding/json.
type Status struct {
	Socket string    `json:"socket"`         // as ParseSocket reads it
	Name   string    `json:"name,omitempty"` // what it calls itself; "": it has not spoken of a container yet
	State  State     `json:"state"`
	Why    string    `json:"why,omitempty"` // it is Absent or Unreachable
	Asked  time.Time `json:"asked,omitzero"`
}

// Status tells of every runtime, in the order of Options.Sockets. Nobody is asked: that
// might start a runtime on whose socket systemd listens.
func (c *Containers) Status() []Status {
	out := make([]Status, 0, len(c.runtimes))
	for _, r := range c.runtimes {
		c.mu.Lock()
		s := r.last
		c.mu.Unlock()
		if s.Socket = r.String(); s.State == "" {
			s.State = Unasked
			if _, err := os.Stat(r.Path); errors.Is(err, fs.ErrNotExist) {
				s.State, s.Why = Absent, err.Error()
			}
		}
		out = append(out, s)
	}
	return out
}

// after is the status with the answer to one more question, which is is, or err.
func (s Status) after(is *container, err error) Status {
	s.Asked, s.State, s.Why = time.Now(), Reachable, ""
	switch {
	case err == nil && printable(is.runtime):
		s.Name = is.runtime
	case err == nil, errors.Is(err, errUnknown), errors.Is(err, errNotYet):
	case absent(err):
		s.State = Absent
	default:
		s.State = Unreachable
	}
	if s.State != Reachable {
		why := err.Error() // partly the runtime's own words, of any length
		s.Why = strings.ToValidUTF8(why[:min(len(why), maxValue)], "?")
	}
	return s
}
