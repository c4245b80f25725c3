package policydb

import (
	"fmt"

	"github.com/hashicorp/go-memdb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	table          = "resource"
	indexID        = "id"        // kind, namespace, name
	indexNamespace = "namespace" // namespace, kind, name
)

// Index keys are text in parts, each ended by a zero byte, which no name holds; a
// namespace ends in a slash first, so that a prefix of it is whole elements.
var dbSchema = &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{
	table: {
		Name: table,
		Indexes: map[string]*memdb.IndexSchema{
			indexID: {Name: indexID, Unique: true, Indexer: keyIndex(func(k Key) string {
				return k.Kind + "\x00" + dirPath(k.Namespace) + "\x00" + k.Name + "\x00"
			})},
			indexNamespace: {Name: indexNamespace, Unique: true, Indexer: keyIndex(func(k Key) string {
				return dirPath(k.Namespace) + "\x00" + k.Kind + "\x00" + k.Name + "\x00"
			})},
		},
	},
}}

// Arguments of prefix queries.
type (
	under       string                           // indexNamespace: a namespace and all below
	exactly     string                           // indexNamespace: a namespace alone
	underKind   struct{ kind, namespace string } // indexID: of one kind, a namespace and all below
	exactlyKind struct{ kind, namespace string } // indexID: of one kind, a namespace alone
)

// keyIndex is a memdb.Indexer over a function of the key.
type keyIndex func(Key) string

// FromObject is part of memdb.SingleIndexer.
func (f keyIndex) FromObject(v any) (bool, []byte, error) {
	r, ok := v.(*symbolonv1.Resource)
	if !ok {
		return false, nil, fmt.Errorf("%T is not a resource", v)
	}
	return true, []byte(f(KeyOf(r))), nil
}

// FromArgs is part of memdb.Indexer.
func (f keyIndex) FromArgs(args ...any) ([]byte, error) {
	if len(args) == 1 {
		if k, ok := args[0].(Key); ok {
			return []byte(f(k)), nil
		}
	}
	return nil, fmt.Errorf("want one Key, not %v", args)
}

// PrefixFromArgs is part of memdb.PrefixIndexer.
func (f keyIndex) PrefixFromArgs(args ...any) ([]byte, error) {
	if len(args) == 1 {
		switch a := args[0].(type) {
		case under:
			return []byte(dirPath(string(a))), nil
		case exactly:
			return []byte(dirPath(string(a)) + "\x00"), nil
		case underKind:
			return []byte(a.kind + "\x00" + dirPath(a.namespace)), nil
		case exactlyKind:
			return []byte(a.kind + "\x00" + dirPath(a.namespace) + "\x00"), nil
		}
	}
	return nil, fmt.Errorf("want one prefix, not %v", args)
}
