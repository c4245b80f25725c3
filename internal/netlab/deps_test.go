package netlab

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What is given the names of programs: our functions, those that wrap them in
// integration, and variables.
var (
	requirers = []string{"Test", "Require", "Missing", "Tool"}
	wrappers  = []string{"newWorld", "newBareWorld", "newSpireWorld"}
	lists     = []string{"tools", "demoTools"}
)

// TestDepsInstallWhatTestsNeed: a bare machine has every program that a test asks for
// after hack/deps.sh, which `make test` and `make demo` run first.
func TestDepsInstallWhatTestsNeed(t *testing.T) {
	script, err := os.ReadFile("../../hack/deps.sh")
	if err != nil {
		t.Fatal(err)
	}
	installed := make(map[string]bool)
	for _, m := range regexp.MustCompile(`\[([a-z0-9-]+)\]=|postgres=\(([a-z ]+)\)`).FindAllStringSubmatch(string(script), -1) {
		for _, name := range strings.Fields(m[1] + m[2]) {
			installed[name] = true
		}
	}
	needed := programsOf(t, "../..")
	if len(needed) < 15 {
		t.Fatalf("found but %d programs in the tree's calls: %v", len(needed), needed)
	}
	for name, where := range needed {
		if !installed[name] {
			t.Errorf("%s needs %s, which hack/deps.sh does not install", where, name)
		}
	}
}

// programsOf finds the programs that a tree's Go code requires, and where.
func programsOf(t *testing.T, root string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	files := token.NewFileSet()
	add := func(exprs []ast.Expr) {
		for _, e := range exprs {
			lit, ok := e.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				continue
			}
			name, err := strconv.Unquote(lit.Value)
			if err == nil && !strings.Contains(name, "no-such") && !strings.Contains(name, "/") {
				found[name] = files.Position(lit.Pos()).String()
			}
		}
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil // under somebody's hands; the compiler will say
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				switch f := n.Fun.(type) {
				case *ast.Ident:
					if names := map[string][]string{"netlab": requirers, "integration": wrappers}[file.Name.Name]; slices.Contains(names, f.Name) {
						add(n.Args)
					}
				case *ast.SelectorExpr:
					if x, ok := f.X.(*ast.Ident); ok && x.Name == "netlab" && slices.Contains(requirers, f.Sel.Name) {
						add(n.Args)
					}
				}
			case *ast.ValueSpec:
				if len(n.Names) == 1 && len(n.Values) == 1 && slices.Contains(lists, n.Names[0].Name) {
					if list, ok := n.Values[0].(*ast.CompositeLit); ok {
						add(list.Elts)
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
