package integration

import (
	"testing"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
)

// held starts a client that keeps a connection to the server open, waits until it is,
// and returns where the client's words will come.
func (w *world) held(addr string) <-chan string {
	w.t.Helper()
	said := make(chan string, 1)
	go func() { said <- w.try(w.Client, "hold", addr) }()
	w.eventually("the connection is held", func() bool {
		var live []flow.Line
		if err := w.client.Debug(w.ctx(), "connections", &live); err != nil {
			w.t.Fatal(err)
		}
		return len(live) == 1 && live[0].BytesReceived > 0
	})
	return said
}

// Who leaves a group loses what the group may do: the SVID is issued anew without
// anybody connecting, and the connections that stood on the old one are cut.
func TestLeavingAGroupCuts(t *testing.T) {
	w := newBareWorld(t, "unshare", "mount")
	const group = "/etc/group"
	with, without := "root:x:0:\noperators:x:4242:root\n", "root:x:0:\n"
	var err error
	if w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{Namespace: "/acme/prod", Files: map[string]string{group: with}}); err != nil {
		t.Fatal(err)
	}
	if w.server, err = w.fleet.Proxy(w.ctx(), w.Server, fleet.Enrolment{Namespace: "/acme/prod"}); err != nil {
		t.Fatal(err)
	}
	w.echo(w.Server)
	w.apply("---\nkind: Policy\nnamespace: /acme/prod\nname: operators\nsubject: {app: client, os.group: operators}\nverb: allow\nobject: {app: echo}\n")
	said := w.held("10.2.0.2:7002")
	if err := w.client.SetFile(group, without); err != nil {
		t.Fatal(err)
	}
	w.expect("the held connection", <-said, "open\nreset")
	w.expect("a new one", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	if err := w.client.SetFile(group, with); err != nil {
		t.Fatal(err)
	}
	w.expect("back in the group", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
}
