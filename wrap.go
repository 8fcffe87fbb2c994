package throttler

import "context"

// Wrap returns f with a limit: each call first consumes for the identifier key(a), with the options. A denial is returned
// as a [*LimitedError], which is ErrLimited and holds the Verdict. After a denial, or an error of Consume, f is not called.
// The tokens stay taken whatever f returns.
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
