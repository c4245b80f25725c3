package flow

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

var update = flag.Bool("update", false, "write the golden files")

// whole is a record in which every field is set, and no two numbers are the same.
func whole() *symbolonv1.FlowRecord {
	return &symbolonv1.FlowRecord{
		FlowId: "000102030405060708090a0b0c0d0e0f", Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Host: "h-1",
		Start: timestamppb.New(time.Date(2026, 7, 1, 12, 0, 0, 123456789, time.UTC)),
		End:   timestamppb.New(time.Date(2026, 7, 1, 12, 0, 1, 0, time.UTC)),
		Source: &symbolonv1.FlowEndpoint{
			SpiffeId: "spiffe://acme.example/acme/prod/web", Namespace: "/acme/prod", Workload: "web",
			Attributes: map[string]*symbolonv1.LabelValues{"env": {Values: []string{"prod"}}, "app": {Values: []string{"web", "edge"}}},
			Address:    "10.0.0.1:40000", External: "/acme/office", AttributesFrom: "extension",
		},
		Destination: &symbolonv1.FlowEndpoint{
			SpiffeId: "spiffe://acme.example/acme/prod/db", Namespace: "/acme/prod", Workload: "db",
			Attributes: map[string]*symbolonv1.LabelValues{"app": {Values: []string{"db"}}},
			Address:    "[fd00::2]:5432", External: "/acme/prod/db-lb", AttributesFrom: "policy",
		},
		Outcome: symbolonv1.Outcome_OUTCOME_DENY,
		Reason:  symbolonv1.Reason_REASON_PEER_REFUSED, PeerReason: symbolonv1.Reason_REASON_ENCRYPTION_UNAVAILABLE,
		ClientPolicy: "/acme/prod/web-uses-db", ServerPolicy: "/acme/db-for-all",
		WouldVerdict: "allow", WouldPolicy: "/acme/prod/trial",
		Protection: symbolonv1.Protection_PROTECTION_AUTHENTICATED,
		TlsVersion: "TLS 1.3", CipherSuite: "TLS_AES_256_GCM_SHA384", KeyExchange: "X25519MLKEM768",
		Resumed: true, Reused: true, Local: true,
		BytesSent: 1001, BytesReceived: 1<<40 + 1, FirstByteMicros: 1003, Generation: 1004,
		Detail: "the peer refused: \"a <b> & c\"\nand more",
	}
}

// eachEmpty calls found for every field of m, and of the messages in it, that is not
// set.
func eachEmpty(m protoreflect.Message, found func(protoreflect.FullName)) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case !m.Has(f):
			found(f.FullName())
		case f.Message() != nil && !f.IsMap() && !f.IsList() && f.Message().FullName() != "google.protobuf.Timestamp":
			eachEmpty(m.Get(f).Message(), found)
		}
	}
}

// TestLineGolden holds the promised form. A field that flow.proto has and the line
// has not shows up here as soon as whole sets it, which it must.
func TestLineGolden(t *testing.T) {
	eachEmpty(whole().ProtoReflect(), func(name protoreflect.FullName) {
		t.Errorf("%s is not set in the golden record", name)
	})
	for file, r := range map[string]*symbolonv1.FlowRecord{
		"whole.json": whole(),
		"empty.json": {},
		"open.json": { // a live connection has no end
			FlowId: "00", Reporter: symbolonv1.Reporter_REPORTER_LOCAL, Start: timestamppb.New(time.Unix(1, 0)),
			Source: &symbolonv1.FlowEndpoint{}, Destination: &symbolonv1.FlowEndpoint{Address: "127.0.0.1:80"},
			Outcome: symbolonv1.Outcome_OUTCOME_ALLOW, Local: true,
		},
	} {
		t.Run(file, func(t *testing.T) {
			got := appendLine(nil, r)
			if *update {
				if err := os.WriteFile("testdata/"+file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile("testdata/" + file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestLineReadsBack: what is written can be read into the same type.
func TestLineReadsBack(t *testing.T) {
	b := appendLine(nil, whole())
	got := &Line{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(NewLine(whole()), got); diff != "" {
		t.Error(diff)
	}
}

// TestEnumNames: every value of every enum has a name in kebab case, no two the same.
func TestEnumNames(t *testing.T) {
	for _, enum := range []struct {
		of     protoreflect.EnumDescriptor
		name   func(int32) string
		unset  string
		sample map[int32]string
	}{
		{
			symbolonv1.Reason(0).Descriptor(), func(n int32) string { return ReasonName(symbolonv1.Reason(n)) }, "",
			map[int32]string{10: "peer-unprotected", 4: "encryption-unavailable", 43: "reset", 50: "policy-changed", 999: "999"},
		},
		{
			symbolonv1.Protection(0).Descriptor(), func(n int32) string { return ProtectionName(symbolonv1.Protection(n)) }, "none",
			map[int32]string{1: "authenticated", 2: "encrypted"},
		},
		{
			symbolonv1.Outcome(0).Descriptor(), func(n int32) string { return NewLine(&symbolonv1.FlowRecord{Outcome: symbolonv1.Outcome(n)}).Outcome }, "unspecified",
			map[int32]string{1: "allow", 2: "deny", 3: "error"},
		},
		{
			symbolonv1.Reporter(0).Descriptor(), func(n int32) string {
				return NewLine(&symbolonv1.FlowRecord{Reporter: symbolonv1.Reporter(n)}).Reporter
			}, "unspecified",
			map[int32]string{1: "client", 2: "server", 3: "local"},
		},
	} {
		for n, want := range enum.sample {
			if got := enum.name(n); got != want {
				t.Errorf("%s %d is %q, want %q", enum.of.Name(), n, got, want)
			}
		}
		seen := make(map[string]bool)
		for i := range enum.of.Values().Len() {
			n := int32(enum.of.Values().Get(i).Number())
			name := enum.name(n)
			if n == 0 && name != enum.unset || n != 0 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz-") != "" || seen[name] {
				t.Errorf("%s %d is called %q", enum.of.Name(), n, name)
			}
			seen[name] = true
		}
	}
}

// FuzzAppendLine: whatever a record holds, it is one line of valid JSON, which
// reads back.
func FuzzAppendLine(f *testing.F) {
	for _, r := range []*symbolonv1.FlowRecord{
		{}, whole(),
		{Start: &timestamppb.Timestamp{Seconds: 1 << 60}, End: &timestamppb.Timestamp{Nanos: -1}},
		{Reason: 12345, Outcome: -1, Reporter: 77, Protection: 9},
		{Source: &symbolonv1.FlowEndpoint{Attributes: map[string]*symbolonv1.LabelValues{"": nil, "\x00\u2028": {}}}},
	} {
		wire, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire, "a\nb", "c")
	}
	f.Add([]byte{}, "\xff\xfe not UTF-8", "\u2028\r\n\x00</script>")
	f.Fuzz(func(t *testing.T, wire []byte, detail, name string) {
		r := &symbolonv1.FlowRecord{}
		if proto.Unmarshal(wire, r) != nil {
			r = &symbolonv1.FlowRecord{}
		}
		// protobuf refuses what is not UTF-8; a proxy's own record may hold it.
		r.Detail += detail
		r.Source = &symbolonv1.FlowEndpoint{Workload: name, Attributes: map[string]*symbolonv1.LabelValues{
			name: {Values: []string{detail}}, name + "b": {Values: []string{}}, detail + "a": {Values: []string{"", name, "plain"}},
		}}
		b := appendLine([]byte("before"), r)[len("before"):]
		want, err := json.Marshal(NewLine(r))
		if err != nil {
			t.Fatalf("%v: %v", r, err)
		}
		if diff := cmp.Diff(string(want)+"\n", string(b)); diff != "" {
			t.Fatalf("not what encoding/json makes of it: %s", diff)
		}
		if n := bytes.IndexByte(b, '\n'); n != len(b)-1 || bytes.ContainsRune(b, '\r') {
			t.Fatalf("not one line: %q", b)
		}
		line := &Line{}
		if err := json.Unmarshal(b, line); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		if want := strings.ToValidUTF8(r.GetDetail(), "\ufffd"); strings.ReplaceAll(line.Detail, "\ufffd", "") != strings.ReplaceAll(want, "\ufffd", "") {
			t.Fatalf("detail %q, want %q", line.Detail, want)
		}
	})
}
