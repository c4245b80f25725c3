package controller

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// TestPlainFlowSeesEveryText: a text that is not looked at could steer an operator's
// terminal. Each that the message can hold is made evil in turn, whatever fields it has.
func TestPlainFlowSeesEveryText(t *testing.T) {
	for _, text := range []string{"", "web", "~ !", strings.Repeat("x", maxFlowDetail)} {
		n := eachText(text, func(name string, r *symbolonv1.FlowRecord) {
			if !plainFlow(r) {
				t.Errorf("%s: %.20q is not plain", name, text)
			}
			before := proto.CloneOf(r)
			if cleanFlow(r.ProtoReflect()); !proto.Equal(before, r) {
				t.Errorf("%s: %.20q is plain, and cleaned all the same", name, text)
			}
		})
		if n < 24 { // 10 of the record, 7 of each end or more
			t.Fatalf("%d texts: they were not found", n)
		}
	}
	for _, text := range []string{"\x1b[2J", "a\nb", "\x00", "\x7f", "\u202e", "ä", "\xff", strings.Repeat("x", maxFlowText+1)} {
		eachText(text, func(name string, r *symbolonv1.FlowRecord) {
			if plainFlow(r) {
				t.Errorf("%s: %.20q is plain", name, text)
			}
		})
	}
	if plainFlow(&symbolonv1.FlowRecord{Detail: strings.Repeat("x", maxFlowDetail+1)}) {
		t.Error("a long detail is plain")
	}
}

// eachText calls f with records that hold text in one place each, and tells how many
// places there are.
func eachText(text string, f func(name string, r *symbolonv1.FlowRecord)) (n int) {
	// A path leads from a new record to the message that holds the text.
	var walk func(name string, d protoreflect.MessageDescriptor, path func(protoreflect.Message) protoreflect.Message)
	walk = func(name string, d protoreflect.MessageDescriptor, path func(protoreflect.Message) protoreflect.Message) {
		with := func(name string, set func(protoreflect.Message)) {
			n++
			r := &symbolonv1.FlowRecord{}
			set(path(r.ProtoReflect()))
			f(name, r)
		}
		for i := range d.Fields().Len() {
			fd := d.Fields().Get(i)
			at := name + "." + string(fd.Name())
			v := protoreflect.ValueOfString(text)
			isText := fd.Kind() == protoreflect.StringKind
			switch {
			case fd.IsMap():
				if fd.MapKey().Kind() == protoreflect.StringKind {
					with(at+" key", func(m protoreflect.Message) {
						entries := m.Mutable(fd).Map()
						entries.Set(v.MapKey(), entries.NewValue())
					})
				}
				if fd.MapValue().Kind() == protoreflect.StringKind {
					with(at+" value", func(m protoreflect.Message) {
						m.Mutable(fd).Map().Set(protoreflect.ValueOfString("k").MapKey(), v)
					})
				}
				if of := fd.MapValue().Message(); of != nil {
					walk(at, of, func(r protoreflect.Message) protoreflect.Message {
						return path(r).Mutable(fd).Map().Mutable(protoreflect.ValueOfString("k").MapKey()).Message()
					})
				}
			case isText && fd.IsList():
				with(at, func(m protoreflect.Message) {
					m.Mutable(fd).List().Append(protoreflect.ValueOfString("first"))
					m.Mutable(fd).List().Append(v)
				})
			case isText:
				with(at, func(m protoreflect.Message) { m.Set(fd, v) })
			case fd.IsList() && fd.Message() != nil:
				walk(at, fd.Message(), func(r protoreflect.Message) protoreflect.Message {
					return path(r).Mutable(fd).List().AppendMutable().Message()
				})
			case fd.Message() != nil:
				walk(at, fd.Message(), func(r protoreflect.Message) protoreflect.Message {
					return path(r).Mutable(fd).Message()
				})
			}
		}
	}
	d := (&symbolonv1.FlowRecord{}).ProtoReflect().Descriptor()
	walk("flow", d, func(r protoreflect.Message) protoreflect.Message { return r })
	return n
}

func BenchmarkTakeFlow(b *testing.B) {
	end := func(workload string) *symbolonv1.FlowEndpoint {
		return &symbolonv1.FlowEndpoint{
			SpiffeId: "spiffe://acme.example/acme/prod/" + workload, Namespace: "/acme/prod", Workload: workload, Address: "10.1.2.3:41234",
			Attributes: map[string]*symbolonv1.LabelValues{
				"app": {Values: []string{workload}}, "env": {Values: []string{"prod", "eu"}}, "process.exe": {Values: []string{"/usr/bin/" + workload}},
			},
		}
	}
	r := &symbolonv1.FlowRecord{
		FlowId: "0123456789abcdef0123456789abcdef", Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Source: end("web"), Destination: end("db"),
		ClientPolicy: "/acme/prod/web-to-db", ServerPolicy: "/acme/prod/db-from-web", TlsVersion: "TLS 1.3", CipherSuite: "TLS_AES_256_GCM_SHA384", KeyExchange: "X25519MLKEM768",
	}
	host := &hostRecord{ID: "h", Namespace: "/acme/prod"}
	for b.Loop() {
		if err := takeFlow(r, host, spiffeid.RequireTrustDomainFromString("acme.example")); err != nil {
			b.Fatal(err)
		}
	}
}
