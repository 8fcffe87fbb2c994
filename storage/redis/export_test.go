package redis

import goredis "github.com/redis/go-redis/v9"

// Client is the one that Open made.
func (s *Storage) Client() goredis.UniversalClient { return s.client }
