// Which buckets an identifier has. Only the Throttler knows them; a storage gets them with each request.

package throttler

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// AddBucket gives the identifier buckets of its own. The first ones replace Config.Buckets for it, and later ones are
// added. A bucket with the name of an existing one replaces it, and what was spent stays spent. The buckets are known to
// this Throttler only, until they are removed, so call AddBucket in every process that limits the identifier.
//
// An identifier has at most 16 buckets, of different names; otherwise the error is a *BucketError. If any bucket is
// faulty none is added, and all faults are returned, joined. An invalid identifier is ErrInvalidIdentifier. A call
// without buckets changes nothing.
func (t *Throttler) AddBucket(id string, b ...Bucket) error {
	if err := validIdentifier(id); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.ownSet(id).with(b)
	if s.err != nil {
		return s.err
	}
	if len(s.buckets) > 0 {
		t.own.Store(strings.Clone(id), s)
		t.owned.Store(true) // after own, so that a call that sees it also finds the set
		t.waiters.tell(id, changed)
	}
	return nil
}

// Buckets returns a copy of the identifier's own buckets, or of Config.Buckets if it has none of its own.
func (t *Throttler) Buckets(id string) []Bucket {
	s := t.set(id)
	if s == nil {
		return nil
	}
	return slices.Clone(s.buckets)
}

// RemoveBucket removes the identifier's own bucket of this name and reports whether it had one. Once the last one is
// removed Config.Buckets applies again. What was spent from the bucket is not forgotten.
func (t *Throttler) RemoveBucket(id, name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	var rest []Bucket
	had := t.ownSet(id)
	if had == nil {
		return false
	}
	for _, b := range had.buckets {
		if b.Name() != name {
			rest = append(rest, b)
		}
	}
	if len(rest) == len(had.buckets) {
		return false
	}
	if len(rest) == 0 {
		t.own.Delete(id)
	} else {
		t.own.Store(strings.Clone(id), newSet(rest))
	}
	t.waiters.tell(id, changed)
	return true
}

// RemoveBuckets removes all buckets of the identifier's own; Config.Buckets then applies again. What was spent is not
// forgotten.
func (t *Throttler) RemoveBuckets(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ownSet(id) == nil { // nothing changes, so nobody who waits has to reserve again and lose its place
		return
	}
	t.own.Delete(id)
	t.waiters.tell(id, changed)
}

func (t *Throttler) ownSet(id string) *set {
	if !t.owned.Load() {
		return nil
	}
	s, _ := t.own.Load(id)
	own, _ := s.(*set)
	return own
}

// set returns the buckets that apply to the identifier, or nil.
func (t *Throttler) set(id string) *set {
	if s := t.ownSet(id); s != nil {
		return s
	}
	return t.defaults
}

// set is the compiled buckets of an identifier or of a call. It is immutable, so it may be shared without a lock.
type set struct {
	buckets []Bucket
	rules   *storage.RuleSet // of the buckets that are not Unlimited; nil if all are, or if err is set
	elastic *elastic         // nil if no bucket is elastic
	err     error
}

// newSet compiles the buckets and joins all of their faults.
func newSet(buckets []Bucket) *set {
	s, rules := &set{buckets: buckets}, make([]law.Rule, 0, len(buckets))
	var faults []error
	seen := make(map[string]bool, len(buckets))
	for _, b := range buckets {
		if b.rule.Name == "" && b.faults == nil {
			b = b.made()
		}
		faults = append(faults, b.faults...)
		if seen[b.rule.Name] && b.faults == nil {
			faults = append(faults, &BucketError{Bucket: b.rule.Name, Field: "Name", Reason: "is given to two buckets of one identifier; Named tells them apart"})
		}
		seen[b.rule.Name] = true
		if !b.free {
			rules = append(rules, b.rule)
		}
	}
	if len(buckets) > law.MaxBuckets {
		faults = append(faults, &BucketError{Bucket: buckets[law.MaxBuckets].rule.Name, Field: "Buckets", Reason: fmt.Sprintf("of one identifier are %d with it, must be at most %d", len(buckets), law.MaxBuckets)})
	}
	if s.err = errors.Join(faults...); s.err == nil && len(rules) > 0 {
		s.rules = law.NewRuleSet(rules...)
		s.elastic = newElastic(s)
	}
	return s
}

// with returns a set with more buckets. A bucket whose name is taken replaces the old one at the same position.
func (s *set) with(more []Bucket) *set {
	if s == nil {
		return newSet(slices.Clone(more))
	}
	buckets, replaced := slices.Clone(s.buckets), make(map[int]bool)
	for _, b := range more {
		i := slices.IndexFunc(s.buckets, func(had Bucket) bool { return had.Name() == b.Name() })
		if i >= 0 && !replaced[i] {
			buckets[i], replaced[i] = b, true
		} else {
			buckets = append(buckets, b) // a name that appears twice in more is a fault that newSet finds
		}
	}
	return newSet(buckets)
}

// frees reports whether the set has an Unlimited bucket of this name.
func (s *set) frees(name string) bool {
	return slices.ContainsFunc(s.buckets, func(b Bucket) bool { return b.free && b.rule.Name == name })
}
