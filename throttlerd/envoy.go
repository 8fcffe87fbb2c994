// Envoy's rate limit protocol: envoy.service.ratelimit.v3 over gRPC, and the same in JSON as envoyproxy/ratelimit serves it.
//
// After a gRPC error Envoy lets the request through, unless its failure_mode_deny is set, and it does the same after the
// code UNKNOWN. A faulty request is therefore answered with OVER_LIMIT, and so is, by default, a storage that fails.

package main

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/throttlerhttp"
)

const (
	codeOK   = ratelimitv3.RateLimitResponse_OK
	codeOver = ratelimitv3.RateLimitResponse_OVER_LIMIT
)

// envoy is the gRPC service.
type envoy struct {
	ratelimitv3.UnimplementedRateLimitServiceServer
	*service
}

// ShouldRateLimit answers Envoy. It returns an error in two cases only: the caller has gone before the decision begins,
// or the decision failed on the server's side and -on-storage-error is error.
func (s envoy) ShouldRateLimit(ctx context.Context, r *ratelimitv3.RateLimitRequest) (*ratelimitv3.RateLimitResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	d := s.decideEnvoy(ctx, r)
	if s.config.onStorageError == "error" && statusOf(d.err, 0) >= http.StatusInternalServerError {
		return nil, status.Error(codes.Unavailable, title(d.err))
	}
	return s.response(r, d), nil
}

// codec is the codec of gRPC, but makes an empty request of one that cannot be read. gRPC would answer that with an error
// before the service sees it. Clients can bring it about: Envoy makes entries of header fields as they come, and one of
// them that is no UTF-8 makes the whole message invalid.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	err := c.CodecV2.Unmarshal(data, v)
	if r, ok := v.(*ratelimitv3.RateLimitRequest); ok && err != nil {
		r.Reset() // it may have been read in part
		err = nil
	}
	return err
}

func (s *service) decideEnvoy(ctx context.Context, r *ratelimitv3.RateLimitRequest) *decision {
	asked, err := requestOf(r)
	if err != nil {
		return &decision{err: err}
	}
	return s.decide(ctx, asked)
}

// requestOf translates the request for package rules.
func requestOf(r *ratelimitv3.RateLimitRequest) (rules.Request, error) {
	if err := bounded(len(r.GetDescriptors())); err != nil {
		return rules.Request{}, err
	}
	asked := rules.Request{Domain: r.GetDomain(), Descriptors: make([]rules.Descriptor, len(r.GetDescriptors()))}
	if len(asked.Descriptors) == 0 {
		return asked, malformed("it has no descriptors, or cannot be read")
	}
	if asked.Domain == "" {
		return asked, malformed("it has no domain")
	}
	for i, d := range r.GetDescriptors() {
		to := &asked.Descriptors[i]
		to.Cost, to.GiveBack = new(costOf(r, d)), d.GetIsNegativeHits()
		to.Entries = make([]rules.Entry, len(d.GetEntries()))
		for j, e := range d.GetEntries() {
			to.Entries[j] = rules.Entry{Key: e.GetKey(), Value: e.GetValue()}
		}
		if d.GetLimit() == nil {
			continue
		}
		limit, err := override(d.GetLimit())
		if err != nil {
			return asked, err
		}
		to.Limit = &limit
	}
	return asked, nil
}

// costOf returns the cost of a descriptor: its own hits_addend, or else that of the request, where 0 means 1. If its hits
// are negative, that much is given back.
func costOf(r *ratelimitv3.RateLimitRequest, d *commonv3.RateLimitDescriptor) int64 {
	if d.GetHitsAddend() != nil {
		return int64(min(d.GetHitsAddend().GetValue(), math.MaxInt64)) //nolint:gosec // it is not larger
	}
	return int64(max(1, r.GetHitsAddend()))
}

const day = 24 * time.Hour

var units = map[typev3.RateLimitUnit]time.Duration{
	typev3.RateLimitUnit_SECOND: time.Second, typev3.RateLimitUnit_MINUTE: time.Minute, typev3.RateLimitUnit_HOUR: time.Hour,
	typev3.RateLimitUnit_DAY: day, typev3.RateLimitUnit_MONTH: 30 * day, typev3.RateLimitUnit_YEAR: 365 * day,
}

const longest = 366 * day // period of a bucket

// override returns the limit that a descriptor brings. It is a fixed window, which is also the default of limits in files
// of envoyproxy/ratelimit.
func override(o *commonv3.RateLimitDescriptor_RateLimitOverride) (throttler.Bucket, error) {
	unit, known := units[o.GetUnit()]
	if !known {
		return throttler.Bucket{}, malformed("a limit has the unit %s", o.GetUnit())
	}
	times := int64(1)
	if m := o.GetUnitMultiplier(); m != nil {
		times = int64(m.GetValue())
	}
	if times < 1 || times > int64(longest/unit) {
		return throttler.Bucket{}, malformed("a limit has a unit_multiplier of %d", times)
	}
	return throttler.NewBucket(time.Duration(times*int64(unit)), int64(o.GetRequestsPerUnit())).FixedWindow(), nil
}

// response translates the decision for Envoy, with one status for each descriptor. A request with too many descriptors
// gets no more statuses than another may have: otherwise the answer would be twice as large as the message.
func (s *service) response(r *ratelimitv3.RateLimitRequest, d *decision) *ratelimitv3.RateLimitResponse {
	out := &ratelimitv3.RateLimitResponse{OverallCode: codeOK, DynamicMetadata: d.metadata()}
	if !d.v.Allowed {
		out.OverallCode = codeOver
	}
	out.Statuses = make([]*ratelimitv3.RateLimitResponse_DescriptorStatus, 0, min(len(r.GetDescriptors()), maxDescriptors))
	for i := range cap(out.Statuses) {
		out.Statuses = append(out.Statuses, d.status(i))
	}
	fields := make(http.Header, len(envoyFields))
	throttlerhttp.SetFields(fields, d.v)
	for _, f := range envoyFields {
		if values := fields[f.name]; len(values) > 0 {
			out.ResponseHeadersToAdd = append(out.ResponseHeadersToAdd, &corev3.HeaderValue{Key: f.envoy, Value: values[0]})
		}
	}
	return out
}

// envoyFields are the header fields of throttlerhttp that Envoy adds to its answer to the client, by Envoy's names too.
var envoyFields = [...]struct{ name, envoy string }{
	{"Ratelimit-Policy", "ratelimit-policy"}, {"Ratelimit", "ratelimit"}, {"Retry-After", "retry-after"},
}

// metadata returns what filters and access logs of Envoy can read about the decision; nil if there is nothing to say.
func (d *decision) metadata() *structpb.Struct {
	var m *structpb.Struct
	add := func(name string, v *structpb.Value) {
		if m == nil {
			m = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		}
		m.Fields[name] = v
	}
	list := func(name string, ids []string) {
		values := &structpb.ListValue{}
		for _, id := range ids {
			values.Values = append(values.Values, structpb.NewStringValue(id))
		}
		add(name, structpb.NewListValue(values))
	}
	if ids := d.deniedBy(); len(ids) > 0 {
		list("denied_by", ids)
	}
	if ids := d.ids(func(a *rules.Applied) bool { return a.Denied && a.Rule.Quota }); len(ids) > 0 {
		list("over_quota", ids)
	}
	if !d.denied() {
		add("error", structpb.NewStringValue(title(d.err)))
	}
	if d.v.Degraded() {
		add("degraded", structpb.NewBoolValue(true))
	}
	return m
}

// status returns the status of one descriptor. It describes the limit that is closest to denying.
func (d *decision) status(descriptor int) *ratelimitv3.RateLimitResponse_DescriptorStatus {
	out := &ratelimitv3.RateLimitResponse_DescriptorStatus{Code: codeOK}
	if !d.denied() {
		out.Code = codeOver // undecided: see the top of this file
	}
	var nearest *throttler.Level
	var of *rules.Rule
	for i := range d.applied {
		a := &d.applied[i]
		if a.Descriptor != descriptor || a.Rule.Shadow || a.Rule.Quota {
			continue
		}
		if a.Denied {
			out.Code = codeOver
		}
		for j := range a.Levels {
			if l := &a.Levels[j]; nearest == nil || nearer(l, nearest) {
				nearest, of = l, a.Rule
			}
		}
	}
	if nearest != nil {
		describe(out, nearest, of)
	}
	return out
}

func nearer(a, b *throttler.Level) bool {
	if a.RetryAfter != b.RetryAfter {
		return a.RetryAfter > b.RetryAfter
	}
	return a.Remaining < b.Remaining
}

var unitsOfLimits = map[time.Duration]ratelimitv3.RateLimitResponse_RateLimit_Unit{
	time.Second: ratelimitv3.RateLimitResponse_RateLimit_SECOND, time.Minute: ratelimitv3.RateLimitResponse_RateLimit_MINUTE,
	time.Hour: ratelimitv3.RateLimitResponse_RateLimit_HOUR, day: ratelimitv3.RateLimitResponse_RateLimit_DAY,
	7 * day: ratelimitv3.RateLimitResponse_RateLimit_WEEK, 30 * day: ratelimitv3.RateLimitResponse_RateLimit_MONTH,
	365 * day: ratelimitv3.RateLimitResponse_RateLimit_YEAR,
}

// describe writes a limit into out. For a period that Envoy has no unit for, the unit is UNKNOWN.
func describe(out *ratelimitv3.RateLimitResponse_DescriptorStatus, l *throttler.Level, of *rules.Rule) {
	out.CurrentLimit = &ratelimitv3.RateLimitResponse_RateLimit{Name: of.Name, RequestsPerUnit: clamp(l.Limit), Unit: unitsOfLimits[l.Period]}
	out.LimitRemaining = clamp(l.Remaining)
	until := l.ResetAfter
	if l.RetryAfter > 0 {
		until = l.RetryAfter
	}
	out.DurationUntilReset = durationpb.New(until)
}

func clamp(n int64) uint32 { return uint32(min(max(n, 0), math.MaxUint32)) } //nolint:gosec // it fits

const maxBody = 1 << 20 // bytes

// json is POST /json: 200, or 429 over the limit, with the response as JSON. Faults are answered with
// application/problem+json.
func (s *service) json(w http.ResponseWriter, r *http.Request) {
	asked := &ratelimitv3.RateLimitRequest{}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		err = protojson.Unmarshal(body, asked)
	}
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		problem(w, http.StatusRequestEntityTooLarge, "the body is too large")
		return
	}
	if err != nil {
		problem(w, http.StatusBadRequest, "the body is no RateLimitRequest in JSON")
		return
	}
	d := s.decideEnvoy(r.Context(), asked)
	out := s.response(asked, d)
	d.admit = func(w http.ResponseWriter, _ *http.Request) { writeProto(w, http.StatusOK, out) }
	d.refuse = func(w http.ResponseWriter, _ *http.Request, refusal throttlerhttp.Refusal) {
		if d.denied() {
			writeProto(w, http.StatusTooManyRequests, out) // as envoyproxy/ratelimit does, even where waiting does not help
			return
		}
		problem(w, refusal.Status, title(d.err))
	}
	s.answer(w, r, d)
}

func writeProto(w http.ResponseWriter, status int, m *ratelimitv3.RateLimitResponse) {
	data, err := protojson.Marshal(m)
	if err != nil {
		problem(w, http.StatusInternalServerError, title(errInternal))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data)
}
