package cli

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// sanitize makes control characters, format characters such as bidirectional
// overrides, and invalid UTF-8 visible. Line feeds and tabs stay where multiline.
func sanitize(s string, multiline bool) string {
	clean := func(r rune) bool {
		return r != utf8.RuneError && unicode.IsPrint(r) || multiline && (r == '\n' || r == '\t')
	}
	if strings.IndexFunc(s, func(r rune) bool { return !clean(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case clean(r), r == utf8.RuneError:
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

// escapeJSON writes what sanitize would change as JSON escapes. In valid JSON
// such characters stand inside strings only, where the escape means the same.
func escapeJSON(doc []byte) []byte {
	var b strings.Builder
	b.Grow(len(doc))
	for _, r := range string(doc) {
		switch {
		case r == '\n' || r == utf8.RuneError || unicode.IsPrint(r):
			b.WriteRune(r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		}
	}
	return []byte(b.String())
}
