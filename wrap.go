package throttler

import "context"

// Wrap returns f with a limit: each call consumes for key(a) first, with the options. A refusal is a
// *LimitedError, which is ErrLimited and holds the Verdict; then, and after an error of Consume, f is not called.
// What f returns changes nothing: what was taken stays taken.
func Wrap[A, R any](t *Throttler, key func(A) string, f func(context.Context, A) (R, error), o ...Option) func(context.Context, A) (R, error) {
	return func(ctx context.Context, a A) (r R, err error) {
		v, err := t.ConsumeContext(ctx, key(a), o...)
		if err != nil {
			return r, err
		}
		if !v.Allowed {
			return r, &LimitedError{Verdict: v}
		}
		return f(ctx, a)
	}
}
