package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// secrets are the forms in which a careless encoder would give a key away.
func secrets(t testing.TB, s *SVID) []string {
	t.Helper()
	key := s.Key.(*ecdsa.PrivateKey)
	d, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{key.D.String(), key.D.Text(16), "PRIVATE KEY", "-----BEGIN"} //nolint:staticcheck // the field is what encoding/json would show
	for _, b := range [][]byte{d, pkcs8, sec1} {
		out = append(out,
			string(b), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)),
			base64.StdEncoding.EncodeToString(b), base64.RawURLEncoding.EncodeToString(b),
			fmt.Sprintf("%d", b), fmt.Sprintf("%#v", b), strings.ReplaceAll(fmt.Sprintf("%d", b), " ", ","),
			string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b})))
	}
	return out
}

func wantDiscreet(t *testing.T, how, text string, secrets []string) {
	t.Helper()
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("%s shows the private key, or could: it has %.20q", how, s)
			return
		}
	}
}

// TestKeysAreNeverPrinted: not by any way in which something is commonly logged,
// shown or stored.
func TestKeysAreNeverPrinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		cred := mustGet(t, m, webWorkload)
		known := secrets(t, cred.SVID)
		for name, v := range map[string]any{
			"SVID": cred.SVID, "SVID by value": *cred.SVID,
			"Credential": cred, "Credential by value": *cred,
			"Update": Update{Credential: cred}, "Status": m.Snapshot()[0], "Snapshot": m.Snapshot(),
			"in a map": map[string]any{"x": cred.SVID, "y": m.Snapshot()},
			"embedded": struct{ *SVID }{cred.SVID},
		} {
			b, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			wantDiscreet(t, name+" in JSON", string(b), known)
			if !strings.Contains(string(b), webID) {
				t.Errorf("%s in JSON does not even say who it is: %s", name, b)
			}
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
				wantDiscreet(t, name+" by "+verb, fmt.Sprintf(verb, v), known)
			}
			var out bytes.Buffer
			config := zap.NewProductionEncoderConfig()
			for _, enc := range []zapcore.Encoder{zapcore.NewJSONEncoder(config), zapcore.NewConsoleEncoder(config)} {
				log := zap.New(zapcore.NewCore(enc, zapcore.AddSync(&out), zap.DebugLevel))
				log.Info("x", zap.Any("any", v), zap.Reflect("reflect", v))
				log.Sugar().Infow(fmt.Sprintf("%+v", v), "v", v)
			}
			slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v)
			slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
			wantDiscreet(t, name+" in a log", out.String(), known)
		}
	})
}

// TestStatusJSON: what the debug page shows.
func TestStatusJSON(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		mustGet(t, m, webWorkload)
		defer pin(m, webWorkload)()
		end := time.Now().Add(c.ttl).UTC().Truncate(time.Second)
		c.set(func() { c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away")) })
		time.Sleep(time.Hour)

		b, err := json.Marshal(m.Snapshot())
		if err != nil {
			t.Fatal(err)
		}
		var got []map[string]any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		attributes := map[string]any{"spiffe.id": []any{webID}, "spiffe.trust_domain": []any{"acme.example"}}
		for _, a := range webWorkload.Attributes.Union(webClaims) {
			values, _ := attributes[a.Key].([]any)
			attributes[a.Key] = append(values, a.Value)
		}
		want := []map[string]any{{
			"spiffe_id": webID, "namespace": "/acme/prod", "workload": "web", "attributes": attributes,
			"not_after": end.Format(time.RFC3339), "cgroup_id": 7.0, "uid": 33.0,
			"error": "issue SVID: unavailable: away", "pins": 1.0,
		}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

func TestSVIDJSON(t *testing.T) {
	root := newRoot(t, "acme.example")
	key := newTestKey(t)
	leaf := root.issueFor(key.Public(), webID, webClaims, nil)
	s, err := NewSVID([]*x509.Certificate{leaf}, key)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"spiffe_id":%q,"not_after":%q}`, webID, leaf.NotAfter.UTC().Format(time.RFC3339))
	for _, v := range []any{s, *s, &Credential{SVID: s}} {
		if b, err := json.Marshal(v); err != nil || string(b) != want {
			t.Errorf("%T: %s, %v; want %s", v, b, err, want)
		}
	}
	for _, v := range []any{(*SVID)(nil), (*Credential)(nil), &Credential{}} {
		if b, err := json.Marshal(v); err != nil || string(b) != "null" {
			t.Errorf("%T without SVID: %s, %v", v, b, err)
		}
	}
}
