package controller

import symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"

// plainFlow tells whether every text of a record is short and of printable ASCII, so
// that there is nothing for cleanFlow to do. Nearly all are, and to walk a message by
// reflection costs more than to have decoded it. Who adds a text to FlowRecord adds it
// here: TestPlainFlowSeesEveryText has each of them in turn.
func plainFlow(r *symbolonv1.FlowRecord) bool {
	return plainTexts(r.GetFlowId(), r.GetHost(), r.GetClientPolicy(), r.GetServerPolicy(),
		r.GetWouldVerdict(), r.GetWouldPolicy(), r.GetTlsVersion(), r.GetCipherSuite(),
		r.GetKeyExchange(), r.GetDetail()) &&
		plainFlowEnd(r.GetSource()) && plainFlowEnd(r.GetDestination())
}

func plainFlowEnd(e *symbolonv1.FlowEndpoint) bool {
	for key, values := range e.GetAttributes() {
		if !plainTexts(key) || !plainTexts(values.GetValues()...) {
			return false
		}
	}
	return plainTexts(e.GetSpiffeId(), e.GetNamespace(), e.GetWorkload(), e.GetAddress(),
		e.GetExternal(), e.GetAttributesFrom())
}

// plainTexts: none is longer than the tightest bound, or has another byte than
// printable ASCII.
func plainTexts(texts ...string) bool {
	for _, s := range texts {
		if len(s) > min(maxFlowText, maxFlowDetail) {
			return false
		}
		for i := range len(s) {
			if s[i] < ' ' || s[i] > '~' {
				return false
			}
		}
	}
	return true
}
