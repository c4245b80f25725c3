package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	// scanBatch is what the controller takes at once.
	scanBatch = 1000
	// maxScanFile bounds what is read of a file, bytes.
	maxScanFile = 64 << 20
)

func (a *app) scanCommand() *cobra.Command {
	return group("scan", "Tell what scanners found in executables and images",
		`What a scanner found in an executable (by its SHA-256) or an image (by its digest)
becomes attributes vuln.* and image.* of the workloads that run it, on every host, until
it ends or is taken back. Their SVIDs are issued anew, and their open connections judged
again. Profiles make labels of it, as of every attribute.`,
		`  symbolon scan push -f findings.yaml
  symbolon scan list`,
		a.scanPushCommand(), a.scanListCommand(), a.scanRemoveCommand())
}

// scanFile is what scan push reads.
type scanFile struct {
	Scanner  string        `yaml:"scanner"`
	TTL      time.Duration `yaml:"ttl"`
	Findings []struct {
		ExeSHA256   string         `yaml:"exe_sha256"`
		ImageDigest string         `yaml:"image_digest"`
		Attributes  map[string]any `yaml:"attributes"`
	} `yaml:"findings"`
}

func (a *app) scanPushCommand() *cobra.Command {
	var file, scanner string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "push -f FILE",
		Short: "Take a scanner's findings",
		Long: `Take a scanner's findings from a file of YAML or JSON ("-": stdin):

  scanner: trivy
  ttl: 24h
  findings:
    - exe_sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      attributes: {vuln.critical: [CVE-2026-1001, CVE-2026-1002]}
    - image_digest: sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9
      attributes: {vuln.scanned: "yes", image.signed: "no"}

Each stands in the place of what the same scanner said of the same subject before. What
other scanners said stays, and holds as well. A scanner may set vuln.* and image.*, but
not which image it is (image.name, image.id, image.digest).`,
		Example: `  symbolon scan push -f findings.yaml
  scanner-to-findings | symbolon scan push -f - --scanner trivy --ttl 12h`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.scanPush(ctx, file, scanner, ttl) }),
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the file of findings; - is stdin")
	cmd.Flags().StringVar(&scanner, "scanner", "", "the scanner's name, in place of the file's")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "how long the findings hold, in place of the file's (24h)")
	return cmd
}

func (a *app) scanPush(ctx context.Context, file, scanner string, ttl time.Duration) error {
	if file == "" {
		return usagef("-f is needed: the file of findings, or - for stdin")
	}
	in := a.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return usagef("%w", err)
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxScanFile+1))
	if err != nil {
		return usagef("%s: %w", file, err)
	}
	if len(data) > maxScanFile {
		return usagef("%s: larger than %d MiB; push it in parts", file, maxScanFile>>20)
	}
	req, err := parseScan(data)
	if err != nil {
		return usagef("%s: %w", file, err)
	}
	if scanner != "" {
		req.Scanner = scanner
	}
	if ttl != 0 {
		req.Ttl = durationpb.New(ttl)
	}
	if req.GetScanner() == "" {
		return usagef("%s does not say which scanner it is from: add \"scanner: NAME\", or give --scanner", file)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	var total symbolonv1.PushScanResponse
	for batch := range slices.Chunk(req.GetFindings(), scanBatch) {
		res, err := call(ctx, a, c.PushScan, &symbolonv1.PushScanRequest{Scanner: req.GetScanner(), Ttl: req.GetTtl(), Findings: batch})
		if err != nil {
			return err
		}
		total.Changed += res.GetChanged()
		total.Hosts += res.GetHosts()
		total.Until = res.GetUntil()
	}
	a.say("%d findings of %s hold until %s; %d changed, %s told", len(req.GetFindings()), req.GetScanner(),
		absolute(a.Location, total.GetUntil()), total.GetChanged(), countOf(int(total.GetHosts()), "host"))
	return nil
}

func countOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// parseScan is strict: what is not understood is an error that shows its line.
func parseScan(data []byte) (*symbolonv1.PushScanRequest, error) {
	var f scanFile
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&f); err != nil {
		return nil, fmt.Errorf("%s", strings.TrimSpace(yaml.FormatError(err, false, true)))
	}
	if len(f.Findings) == 0 {
		return nil, fmt.Errorf("no findings")
	}
	req := &symbolonv1.PushScanRequest{Scanner: f.Scanner}
	if f.TTL != 0 {
		req.Ttl = durationpb.New(f.TTL)
	}
	for i, x := range f.Findings {
		out := &symbolonv1.ScanFinding{ExeSha256: x.ExeSHA256, ImageDigest: x.ImageDigest, Attributes: make(map[string]*symbolonv1.LabelValues)}
		for key, value := range x.Attributes {
			values, err := scanValues(value)
			if err != nil {
				return nil, fmt.Errorf("finding %d: %s: %w", i+1, key, err)
			}
			out.Attributes[key] = &symbolonv1.LabelValues{Values: values}
		}
		req.Findings = append(req.Findings, out)
	}
	return req, nil
}

// scanValues is one text or several.
func scanValues(v any) ([]string, error) {
	switch v := v.(type) {
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, fmt.Errorf("%v is not text; put it in quotes", x)
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%v is not text; put it in quotes", v)
}

func (a *app) scanListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List what scanners said, and until when it holds",
		Long: `List what scanners said of executables and images and holds now. -o wide also says who
was let in to say it.`,
		Example: `  symbolon scan list
  symbolon scan list -o json`,
		Args: cobra.NoArgs,
		RunE: a.run(a.scanList),
	}
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) scanList(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.ListScans, &symbolonv1.ListScansRequest{})
	if err != nil {
		return err
	}
	l := list{message: resp, empty: "no findings; push some with: symbolon scan push -f FILE"}
	for _, s := range resp.GetScans() {
		l.names = append(l.names, s.GetFinding().GetExeSha256()+s.GetFinding().GetImageDigest())
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "SUBJECT", "SCANNER", "ATTRIBUTES", "UNTIL", "|", "PUSHED", "BY")
		for i, s := range resp.GetScans() {
			until := text(ago(a.Now(), s.GetUntil()))
			if wide {
				until = text(absolute(a.Location, s.GetUntil()))
			}
			t.row(text(l.names[i]), text(s.GetScanner()), text(attributes(s.GetFinding().GetAttributes())), until,
				text(absolute(a.Location, s.GetPushed())), text(s.GetActor()))
		}
		return t
	}
	return a.printList(l)
}

func (a *app) scanRemoveCommand() *cobra.Command {
	var scanner string
	cmd := &cobra.Command{
		Use:   "remove [SUBJECT] [--scanner NAME]",
		Short: "Take findings back",
		Long: `Take findings back before they end: those of one executable (64 hexadecimal digits) or
image (sha256: and 64 of them), those of one scanner, or of both.`,
		Example: `  symbolon scan remove 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
  symbolon scan remove --scanner trivy --yes`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error { return a.scanRemove(ctx, args, scanner) }),
	}
	cmd.Flags().StringVar(&scanner, "scanner", "", "only what this scanner said")
	a.yesFlag(cmd)
	return cmd
}

func (a *app) scanRemove(ctx context.Context, args []string, scanner string) error {
	req := &symbolonv1.RemoveScansRequest{Scanner: scanner}
	switch {
	case len(args) == 1 && strings.HasPrefix(args[0], "sha256:"):
		req.ImageDigest = args[0]
	case len(args) == 1:
		req.ExeSha256 = args[0]
	case scanner == "":
		return usagef("say which: a subject, --scanner, or both")
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	about, whose := "everything", "any scanner"
	if len(args) == 1 {
		about = args[0]
	}
	if scanner != "" {
		whose = scanner
	}
	if err := a.confirm("remove what %s said of %s", whose, about); err != nil {
		return err
	}
	res, err := call(ctx, a, c.RemoveScans, req)
	if err != nil {
		return err
	}
	a.say("removed %s; %s told", countOf(int(res.GetRemoved()), "finding"), countOf(int(res.GetHosts()), "host"))
	return nil
}
