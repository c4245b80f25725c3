package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/cloudlab"
	"github.com/symbolon/symbolon/internal/fleet"
)

const metadataAddress = "169.254.169.254:80"

// metadata starts the metadata service of both hosts' clouds where their default routes
// lead, and has the controller believe it. The client is AWS's, and enrols by that alone;
// the server is Google's, and says so beside its join token.
func (w *world) metadata() *cloudlab.Service {
	w.t.Helper()
	must := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	aws, err := cloudlab.NewAWS()
	must(err)
	gcp, err := cloudlab.NewGCP()
	must(err)
	jwks, err := gcp.JWKS()
	must(err)
	certificates, keys := filepath.Join(w.net.Dir(), "aws.pem"), filepath.Join(w.net.Dir(), "google.json")
	must(errors.Join(os.WriteFile(certificates, aws.Certificates(), 0o600), os.WriteFile(keys, jwks, 0o600)))

	s := &cloudlab.Service{
		AWS: func() ([]byte, error) { return aws.Document(aws.Instance("i-0a1b2c3d")) },
		GCP: func(audience string) ([]byte, error) { return gcp.Token(gcp.Instance("7788", audience)) },
	}
	_, err = w.Router.Output(w.ctx(), "ip", "address", "add", strings.TrimSuffix(metadataAddress, ":80")+"/32", "dev", "lo")
	must(err)
	l, err := w.Router.Listen("tcp", metadataAddress)
	must(err)
	server := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	w.t.Cleanup(func() {
		_ = server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			w.t.Error(err)
		}
	})

	must(w.fleet.Reconfigure(w.ctx(),
		fmt.Sprintf(`--enrolment-cloud-aws=[{certificates_file: %q, accounts: ["123456789012"], namespace: /acme/prod, labels: {role: web}}]`, certificates),
		fmt.Sprintf(`--enrolment-cloud-gcp=[{jwks_file: %q, projects: [acme-prod]}]`, keys)))
	w.client, err = w.fleet.Proxy(w.ctx(), w.Client, fleet.Enrolment{Join: fmt.Sprintf("join: aws, ca_file: %q", w.fleet.CAFile())})
	must(err)
	w.server, err = w.fleet.Proxy(w.ctx(), w.Server, fleet.Enrolment{Namespace: "/acme/prod", Config: "identity: {cloud: gcp}"})
	must(err)
	return s
}

// hostIn is the ID of the host of a cloud.
func (w *world) hostIn(provider string) string {
	w.t.Helper()
	out, err := w.fleet.Must(w.ctx(), "host", "list", "-o", "json")
	if err != nil {
		w.t.Fatal(err)
	}
	var list struct {
		Hosts []struct {
			ID         string `json:"id"`
			Attributes map[string]struct {
				Values []string `json:"values"`
			} `json:"attributes"`
		} `json:"hosts"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		w.t.Fatal(err)
	}
	for _, h := range list.Hosts {
		if v := h.Attributes["cloud.provider"].Values; len(v) == 1 && v[0] == provider {
			return h.ID
		}
	}
	w.t.Fatalf("no host of %s in %s", provider, out)
	return ""
}

// Two clouds, and what each says of its machine decides who may talk to whom; what
// applications may ask the metadata service stays policy's to say.
func TestCloud(t *testing.T) {
	w := newBareWorld(t)
	service := w.metadata()
	w.echo(w.Server)
	w.expect("no policy", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")
	const across = "---\nkind: Policy\nnamespace: /acme/prod\nname: across\nsubject: {app: client, cloud.provider: aws, cloud.region: %s}\nverb: allow\n" +
		"object: {app: echo, cloud.zone: europe-west4-a, cloud.project: acme-prod}\n"
	w.apply(fmt.Sprintf(across, "eu-west-1"))
	w.expect("from the region", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
	w.recorded(w.server, "from the region", func(l *flow.Line) bool {
		return to(7001, "allow")(l) && l.Protection == "encrypted" && l.Source.AttributesFrom == "extension"
	})
	w.apply(fmt.Sprintf(across, "us-east-1"))
	w.expect("from another region", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "reset")

	// The proxies asked past their rules; the application does not, unless it may.
	asked := service.Asked.Load()
	w.expect("an application, of the metadata service", w.try(w.Client, "echo", metadataAddress, "x"), "reset")
	if n := service.Asked.Load(); n != asked {
		t.Errorf("the service was asked %d times by an application that may not", n-asked)
	}
	w.recorded(w.client, "the denial", func(l *flow.Line) bool { return l.Destination.Address == metadataAddress && l.Outcome == "deny" })
	w.apply("---\nkind: External\nnamespace: /acme/prod\nname: metadata\nlabels: {ext: metadata}\naddresses: {cidrs: [169.254.169.254/32], ports: [tcp/80]}\n" +
		"---\nkind: Policy\nnamespace: /acme/prod\nname: metadata\nsubject: {app: client}\nverb: allow\nobject: {ext: metadata}\n")
	if said := w.try(w.Client, "echo", metadataAddress, "x"); !strings.Contains(said, "400 Bad Request") {
		t.Errorf("an application that may: %q", said)
	}

	// The host has lost its key. Its document, which every process could have read, does not
	// make anybody that host; the operator does.
	first := w.hostIn("aws")
	if err := errors.Join(w.client.Daemon().Stop(), w.client.Forget(w.ctx())); err != nil {
		t.Fatal(err)
	}
	if err := w.client.Start(w.ctx()); err == nil || !strings.Contains(err.Error(), "has enrolled before: as host "+first) {
		t.Fatalf("the same document again: %v", err)
	}
	if _, err := w.fleet.Must(w.ctx(), "host", "remove", "--yes", "--readmit", first); err != nil {
		t.Fatal(err)
	}
	if err := w.client.Start(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if again := w.hostIn("aws"); again == first {
		t.Error("it is the host that was removed")
	}
	w.apply(fmt.Sprintf(across, "eu-west-1"))
	w.expect("from the region again", w.try(w.Client, "echo", "10.2.0.2:7001", "hello"), "hello")
}
