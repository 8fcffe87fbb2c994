package redis

import (
	"context"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/storage"
)

// Client returns the client of the storage.
func (s *Storage) Client() goredis.UniversalClient { return s.client }

// Batch returns the command that makes the decisions in one script call. The server must have the script.
func (s *Storage) Batch(requests []*storage.Request) []any {
	var calls []*call
	for _, r := range requests {
		key := s.key(r.Name, r.Parts[0].Identifier)
		more, _ := s.moreKeys(r, key)
		calls = append(calls, &call{Query: query{key: key, more: more, request: *r}})
	}
	return s.groups(calls)[0].script(context.Background(), false).Args()
}
