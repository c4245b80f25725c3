package identity

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// An SVID holds a private key, so nothing prints or encodes one field by field:
// whatever a log, a debug page or an error makes of it is its name and its end. The
// methods have value receivers, so that copies are as discreet as pointers.

// summary is what may be told of an SVID.
type summary struct {
	SPIFFEID string    `json:"spiffe_id"`
	NotAfter time.Time `json:"not_after"`
}

func (s SVID) summary() summary {
	var end time.Time
	if len(s.Chain) > 0 {
		end = s.Chain[0].NotAfter.UTC()
	}
	return summary{s.ID.String(), end}
}

// MarshalJSON gives {"spiffe_id", "not_after"} and nothing else, the key least of
// all.
func (s SVID) MarshalJSON() ([]byte, error) { return json.Marshal(s.summary()) }

// String is the ID and when it ends.
func (s SVID) String() string {
	x := s.summary()
	return x.SPIFFEID + " until " + x.NotAfter.Format(time.RFC3339)
}

// Format prints String under every verb: %+v and %#v would show the key.
func (s SVID) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// MarshalJSON is the SVID's. Bundles are public, and long.
func (c Credential) MarshalJSON() ([]byte, error) { return json.Marshal(c.SVID) }

// String is the SVID's.
func (c Credential) String() string {
	if c.SVID == nil {
		return "no SVID"
	}
	return c.SVID.String()
}

// Format prints String under every verb.
func (c Credential) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// statusJSON is a Status for the debug page: flat, and without anything secret.
type statusJSON struct {
	SPIFFEID   string              `json:"spiffe_id,omitempty"`
	Namespace  string              `json:"namespace,omitempty"`
	Workload   string              `json:"workload,omitempty"`
	Attributes map[string][]string `json:"attributes,omitempty"`
	NotAfter   *time.Time          `json:"not_after,omitempty"`
	CgroupID   uint64              `json:"cgroup_id"`
	UID        uint32              `json:"uid"`
	PID        int                 `json:"pid,omitempty"`
	Error      string              `json:"error,omitempty"`
	Pins       int                 `json:"pins"`
}

// MarshalJSON gives
//
//	spiffe_id namespace workload not_after  of the last SVID, absent if there was none
//	attributes    those of the source, and the claims: {"key": ["value", ...]}
//	cgroup_id uid of the key, and pid if it is of one process
//	error         why there is no newer SVID, absent if there is
//	pins          live connections
func (s Status) MarshalJSON() ([]byte, error) {
	out := statusJSON{Pins: s.Pins}
	var all Attributes
	if w := s.Workload; w != nil {
		out.CgroupID, out.UID, out.PID = w.Key.CgroupID, w.Key.UID, w.Key.Process.PID
		all = w.Attributes
	}
	if s.Credential != nil && s.Credential.SVID != nil {
		svid := s.Credential.SVID
		x := svid.summary()
		out.SPIFFEID, out.NotAfter = x.SPIFFEID, &x.NotAfter
		out.Namespace, out.Workload = svid.Namespace, svid.Name
		all = all.Union(svid.Attributes)
	}
	for _, a := range all {
		if out.Attributes == nil {
			out.Attributes = make(map[string][]string)
		}
		out.Attributes[a.Key] = append(out.Attributes[a.Key], a.Value)
	}
	if s.Err != nil {
		out.Error = s.Err.Error()
	}
	return json.Marshal(out)
}

// Format prints what MarshalJSON gives, under every verb.
func (s Status) Format(f fmt.State, _ rune) {
	b, err := json.Marshal(s)
	if err != nil {
		b = []byte(err.Error())
	}
	_, _ = f.Write(b)
}
