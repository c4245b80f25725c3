package cli

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
)

// Exit codes, a promise to scripts.
const (
	// ExitOK: done, or the answer is yes.
	ExitOK = 0
	// ExitNegative: the question was answered, and the answer is no: denied,
	// differs, a test failed, not found.
	ExitNegative = 1
	// ExitUsage: the command line or a file that it names is wrong.
	ExitUsage = 2
	// ExitUnreachable: no answer: the controller cannot be reached, took too long
	// or failed by itself, or the answer could not be written.
	ExitUnreachable = 3
	// ExitRefused: a wrong token, a missing right, a controller that cannot prove
	// to be one.
	ExitRefused = 4
	// ExitConflict: it exists already, or somebody else changed it meanwhile.
	ExitConflict = 5
)

// exitError carries the code that a command ends with. A nil err says that the
// command has printed all there is to say.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// errNegative ends a command whose printed answer is no.
var errNegative = &exitError{code: ExitNegative}

func usagef(format string, args ...any) error {
	return &exitError{ExitUsage, fmt.Errorf(format, args...)}
}

func conflictf(format string, args ...any) error {
	return &exitError{ExitConflict, fmt.Errorf(format, args...)}
}

func notFoundf(format string, args ...any) error {
	return &exitError{ExitNegative, fmt.Errorf(format, args...)}
}

// exitCode maps an error to the promise above.
func exitCode(err error) int {
	var exit *exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, errNotController):
		// crypto/tls's refusal arrives inside an "unavailable".
		return ExitRefused
	case errors.Is(err, context.DeadlineExceeded):
		return ExitUnreachable
	}
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return ExitUsage
	case connect.CodeNotFound, connect.CodeFailedPrecondition:
		return ExitNegative
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeResourceExhausted:
		return ExitRefused
	case connect.CodeAlreadyExists, connect.CodeAborted:
		return ExitConflict
	default:
		return ExitUnreachable
	}
}

// message is what the person reads. The controller's own words stand alone: a
// policy error with file, line and caret must not be wrapped into a line.
func message(err error) string {
	var remote *connect.Error
	if !errors.As(err, &remote) || errors.Is(err, errNotController) {
		return err.Error()
	}
	switch remote.Code() {
	case connect.CodeUnavailable:
		return "the controller cannot be reached: " + remote.Message()
	case connect.CodeDeadlineExceeded:
		return "the controller did not answer in time (see --timeout)"
	case connect.CodeUnauthenticated:
		return "the controller refused the token: " + remote.Message()
	case connect.CodeInternal, connect.CodeUnknown, connect.CodeUnimplemented:
		return fmt.Sprintf("the controller failed: %s (%s)", remote.Message(), remote.Code())
	default:
		return remote.Message()
	}
}
