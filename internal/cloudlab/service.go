package cloudlab

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strconv"
	"sync/atomic"
)

// Service is the metadata service of one machine. It refuses what the real ones refuse.
// A nil document: that cloud's service is not there.
type Service struct {
	AWS   func() ([]byte, error)
	GCP   func(audience string) ([]byte, error)
	Azure func(nonce string) ([]byte, error)

	// Asked counts requests.
	Asked atomic.Int64
}

const (
	sessionToken = "AQAEAGVtbG9u-c2Vzc2lvbg=="
	maxTokenTTL  = 21600 // seconds
)

func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.Asked.Add(1)
	if r.Header.Get("X-Forwarded-For") != "" {
		http.Error(w, "forwarded", http.StatusForbidden)
		return
	}
	switch {
	case s.AWS != nil && r.URL.Path == "/latest/api/token" && r.Method == http.MethodPut:
		if n, err := strconv.Atoi(r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds")); err != nil || n < 1 || n > maxTokenTTL {
			http.Error(w, "ttl", http.StatusBadRequest)
			return
		}
		_, _ = w.Write([]byte(sessionToken))
	case s.AWS != nil && r.URL.Path == "/latest/dynamic/instance-identity/rsa2048":
		if r.Header.Get("X-Aws-Ec2-Metadata-Token") != sessionToken {
			http.Error(w, "no session", http.StatusUnauthorized)
			return
		}
		give(w, lines, func() ([]byte, error) { return s.AWS() })
	case s.GCP != nil && r.URL.Path == "/computeMetadata/v1/instance/service-accounts/default/identity":
		if r.Header.Get("Metadata-Flavor") != "Google" {
			http.Error(w, "flavor", http.StatusForbidden)
			return
		}
		if q := r.URL.Query(); q.Get("format") != "full" || q.Get("audience") == "" {
			http.Error(w, "audience", http.StatusBadRequest)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		give(w, func(b []byte) []byte { return b }, func() ([]byte, error) { return s.GCP(r.URL.Query().Get("audience")) })
	case s.Azure != nil && r.URL.Path == "/metadata/attested/document":
		nonce := r.URL.Query().Get("nonce")
		if r.Header.Get("Metadata") != "true" || r.URL.Query().Get("api-version") == "" || len(nonce) > 32 {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		give(w, attested, func() ([]byte, error) { return s.Azure(nonce) })
	default:
		http.NotFound(w, r)
	}
}

func give(w http.ResponseWriter, form func([]byte) []byte, document func() ([]byte, error)) {
	b, err := document()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(form(b))
}

// lines is base64 in lines of 64, as AWS has it.
func lines(b []byte) []byte {
	text := base64.StdEncoding.EncodeToString(b)
	var out []byte
	for len(text) > 64 {
		out = append(append(out, text[:64]...), '\n')
		text = text[64:]
	}
	return append(out, text...)
}

func attested(b []byte) []byte {
	out, err := json.Marshal(map[string]string{"encoding": "pkcs7", "signature": base64.StdEncoding.EncodeToString(b)})
	if err != nil {
		panic(err) // of strings
	}
	return out
}
