package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
)

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Write or show where the controller is",
		Long: `With --controller, --token-file or --ca-file: write them to
$XDG_CONFIG_HOME/symbolon/config.yaml (by default ~/.config/symbolon/config.yaml), so
that later commands need neither flags nor environment. What is not given stays as
it is in the file. The file names the token's file; it does not hold the token.

Without them: show what is in force, and where each value comes from.`,
		Example: `  symbolon config --controller 198.51.100.5 --token-file ~/admin.token --ca-file ~/ca.pem
  symbolon config`,
		Args: cobra.NoArgs,
		RunE: a.run(a.config),
	}
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) config(context.Context, []string) error {
	if a.flags.fileConfig != (fileConfig{}) {
		return a.saveConfig()
	}
	s, err := a.resolve()
	if err != nil {
		return err
	}
	switch a.output {
	case "json", "yaml":
		doc, err := json.MarshalIndent(s, "", "  ")
		if err == nil && a.output == "yaml" {
			doc, err = yaml.JSONToYAML(doc)
		}
		if err != nil {
			return fmt.Errorf("format settings: %w", err)
		}
		return a.write(append(bytes.TrimSpace(doc), '\n'))
	}
	t := a.newTable(false, "KEY", "VALUE", "FROM")
	for _, x := range s {
		t.row(text(x.Key), text(x.Value), text(x.Source))
	}
	return t.flush()
}

func (a *app) saveConfig() error {
	path, err := a.configPath()
	if err != nil {
		return err
	}
	c, err := readConfig(path)
	if err != nil {
		return err
	}
	if v := a.flags.Controller; v != "" {
		if c.Controller, err = hostPort(v); err != nil {
			return err
		}
	}
	if v := a.flags.CAFile; v != "" {
		if _, err := readRoots(v); err != nil {
			return err
		}
		if c.CAFile, err = filepath.Abs(v); err != nil {
			return usagef("--ca-file: %w", err)
		}
	}
	if v := a.flags.TokenFile; v != "" {
		if _, err := a.readToken(v); err != nil {
			return err
		}
		if c.TokenFile, err = filepath.Abs(v); err != nil {
			return usagef("--token-file: %w", err)
		}
	}
	if err := writeConfig(path, c); err != nil {
		return err
	}
	a.say("written: %s", path)
	return nil
}
