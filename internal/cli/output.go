package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// formats of -o, where a list has them all.
var listFormats = []string{"table", "wide", "json", "yaml", "name"}

// outputFlag adds -o. The first format is the default.
func (a *app) outputFlag(cmd *cobra.Command, formats ...string) {
	// Each command has its own default: a shared variable would keep the last one's.
	output := cmd.Flags().StringP("output", "o", formats[0], "format: "+strings.Join(formats, ", "))
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(
		formats, cobra.ShellCompDirectiveNoFileComp)))
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if a.output = *output; !slices.Contains(formats, a.output) {
			return fmt.Errorf("--output %q: want %s", a.output, strings.Join(formats, ", "))
		}
		return nil
	}
}

// json writes the API's own JSON form (protojson), the same that curl gets.
func (a *app) json(m proto.Message) error {
	doc, err := jsonDocument(m)
	if err != nil {
		return err
	}
	return a.write(doc)
}

// yaml writes what json writes, as YAML.
func (a *app) yaml(m proto.Message) error {
	doc, err := jsonDocument(m)
	if err != nil {
		return err
	}
	return a.writeYAML(doc)
}

// writeYAML writes a JSON document as YAML.
func (a *app) writeYAML(doc []byte) error {
	out, err := yaml.JSONToYAML(doc)
	if err != nil {
		return fmt.Errorf("format YAML: %w", err)
	}
	// The YAML library writes control characters raw. JSON is YAML too (1.2), and
	// can escape them.
	if sanitize(string(out), true) != string(out) {
		out = append(bytes.TrimSpace(doc), '\n')
	}
	return a.write(out)
}

func (a *app) write(data []byte) error {
	_, err := a.out.Write(data)
	return err
}

// show writes an answer as JSON or YAML, if that is asked for; else otherwise does.
func (a *app) show(m proto.Message, otherwise func() error) error {
	switch a.output {
	case "json":
		return a.json(m)
	case "yaml":
		return a.yaml(m)
	}
	return otherwise()
}

// jsonDocument indents again, since protojson varies its white space on purpose.
func jsonDocument(m proto.Message) ([]byte, error) {
	doc, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("format JSON: %w", err)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, doc, "", "  "); err != nil {
		return nil, fmt.Errorf("format JSON: %w", err)
	}
	b.WriteByte('\n')
	return escapeJSON(b.Bytes()), nil
}

// list is a list command's answer in the five formats.
type list struct {
	message proto.Message
	names   []string
	// table fills a table with the default columns, or with all of them.
	table func(wide bool) *table
	// empty is said, not printed, when there is nothing to list.
	empty string
}

func (a *app) printList(l list) error {
	switch a.output {
	case "json":
		return a.json(l.message)
	case "yaml":
		return a.yaml(l.message)
	case "name":
		for _, n := range l.names {
			if err := a.write([]byte(sanitize(n, false) + "\n")); err != nil {
				return err
			}
		}
		return nil
	}
	if len(l.names) == 0 {
		a.say("%s", l.empty)
		return nil
	}
	return l.table(a.output == "wide").flush()
}

// newTable makes a table on stdout; wide adds the columns after the bar "|".
func (a *app) newTable(wide bool, columns ...string) *table {
	if i := slices.Index(columns, "|"); i >= 0 {
		if wide {
			columns = slices.Delete(columns, i, i+1)
		} else {
			columns = columns[:i]
		}
	}
	return newTable(a.out, a.painter(), columns...)
}

// row adds as many of the cells as the table has columns.
func (t *table) row(cells ...cell) { t.add(cells[:len(t.header)]...) }
