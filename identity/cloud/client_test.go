package cloud_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/cloudlab"
)

var challenge = cloud.Challenge{Audience: "symbolon-enrolment:00ff&x=1", Nonce: "00112233445566778899aabbccddeeff"}

// serve starts a metadata service on loopback.
func serve(t *testing.T, h http.Handler) *cloud.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &cloud.Client{Address: s.Listener.Addr().String()}
}

// The service is asked as the real ones want it, and what it signs arrives byte by byte.
func TestFetch(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:9") // nobody is asked there
	t.Setenv("http_proxy", "http://127.0.0.1:9")
	document := bytes.Repeat([]byte{0x30, 0x80, 0xff}, 1000)
	var audience, nonce string
	c := serve(t, &cloudlab.Service{
		AWS:   func() ([]byte, error) { return document, nil },
		GCP:   func(a string) ([]byte, error) { audience = a; return []byte("head.body.signature\n"), nil },
		Azure: func(n string) ([]byte, error) { nonce = n; return document, nil },
	})
	for provider, want := range map[string][]byte{cloud.AWS: document, cloud.GCP: []byte("head.body.signature"), cloud.Azure: document} {
		got, err := c.Fetch(t.Context(), provider, challenge)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want %d", provider, len(got), err, len(want))
		}
	}
	if audience != challenge.Audience || nonce != challenge.Nonce {
		t.Errorf("asked for audience %q, nonce %q", audience, nonce)
	}
	if _, err := c.Fetch(t.Context(), "oracle", challenge); !errors.Is(err, cloud.ErrProvider) {
		t.Errorf("an unknown provider: %v", err)
	}
}

func TestFetchRefuses(t *testing.T) {
	large := base64.StdEncoding.EncodeToString(make([]byte, cloud.MaxDocument+1))
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(s)) }
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	google := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			_, _ = w.Write([]byte(s))
		}
	}
	// session gives a token first.
	session := func(token string, then http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				_, _ = w.Write([]byte(token))
				return
			}
			then(w, r)
		}
	}
	for _, test := range []struct {
		name, provider string
		h              http.HandlerFunc
		want           error
	}{
		{"no such service", cloud.AWS, status(404), cloud.ErrRefused},
		{"switched off", cloud.AWS, status(403), cloud.ErrRefused},
		{"busy", cloud.AWS, status(429), cloud.ErrUnavailable},
		{"broken", cloud.Azure, status(503), cloud.ErrUnavailable},
		{"IMDSv1 only", cloud.AWS, func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			_, _ = w.Write([]byte("MIAG"))
		}, cloud.ErrRefused},
		{"an empty session token", cloud.AWS, session("", text("MIAG")), cloud.ErrAnswer},
		{"a token with a header in it", cloud.AWS, session("a\r\nX-Evil: b", text("MIAG")), cloud.ErrAnswer},
		{"a token without end", cloud.AWS, session(strings.Repeat("a", 2000), text("MIAG")), cloud.ErrAnswer},
		{"no base64", cloud.AWS, session("a", text("<html>")), cloud.ErrAnswer},
		{"nothing", cloud.AWS, session("a", text("")), cloud.ErrAnswer},
		{"a large document", cloud.AWS, session("a", text(large)), cloud.ErrAnswer},
		{"an answer without end", cloud.AWS, session("a", text(large+large)), cloud.ErrAnswer},
		{"no service account", cloud.GCP, status(404), cloud.ErrRefused},
		{"not Google's", cloud.GCP, text("a.b.c"), cloud.ErrAnswer},
		{"an empty token", cloud.GCP, google("\n"), cloud.ErrAnswer},
		{"no JSON", cloud.Azure, text("MIAG"), cloud.ErrAnswer},
		{"another encoding", cloud.Azure, text(`{"encoding":"jws","signature":"MIAG"}`), cloud.ErrAnswer},
		{"no signature", cloud.Azure, text(`{"encoding":"pkcs7"}`), cloud.ErrAnswer},
		{"large headers", cloud.GCP, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", strings.Repeat("a", 1<<16))
		}, cloud.ErrUnavailable},
		{"too slow", cloud.GCP, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, cloud.ErrUnavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if test.name == "too slow" {
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
			}
			defer cancel()
			if b, err := serve(t, test.h).Fetch(ctx, test.provider, challenge); !errors.Is(err, test.want) {
				t.Errorf("%d bytes, %v; want %v", len(b), err, test.want)
			}
		})
	}
}

// Where a redirect leads, nobody is asked: it may be the machine's own services.
func TestFetchFollowsNoRedirect(t *testing.T) {
	asked := false
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer elsewhere.Close()
	c := serve(t, http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	for _, provider := range cloud.Providers() {
		if _, err := c.Fetch(t.Context(), provider, challenge); !errors.Is(err, cloud.ErrRefused) {
			t.Errorf("%s: %v", provider, err)
		}
	}
	if asked {
		t.Error("the redirect was followed")
	}
}

// The dialer is the caller's, and is asked for the one address.
func TestFetchDials(t *testing.T) {
	d := &recorder{}
	c := &cloud.Client{Dialer: d}
	if _, err := c.Fetch(t.Context(), cloud.AWS, challenge); !errors.Is(err, cloud.ErrUnavailable) || !errors.Is(err, errNoNetwork) {
		t.Errorf("err = %v", err)
	}
	if d.address != cloud.DefaultAddress {
		t.Errorf("dialled %q", d.address)
	}
}

var errNoNetwork = errors.New("no network in this test")

type recorder struct{ address string }

func (r *recorder) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	r.address = address
	return nil, errNoNetwork
}

func TestValidAddress(t *testing.T) {
	for address, want := range map[string]bool{
		cloud.DefaultAddress: true, "127.0.0.1:8080": true, "[::1]:80": true, "[fd00:ec2::254]:80": true, "[fd20:ce::254]:80": true, "[fe80::1]:80": true,
		"169.254.169.254": false, "metadata.google.internal:80": false, "10.0.0.1:80": false, "[::ffff:10.0.0.1]:80": false,
		"198.51.100.1:80": false, "[2001:db8::1]:80": false, "127.0.0.1:0": false, "[fe80::1%eth0]:80": false, "": false, "http://169.254.169.254": false,
	} {
		if got := cloud.ValidAddress(address); got != want {
			t.Errorf("%q: %v", address, got)
		}
	}
}
