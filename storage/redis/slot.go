package redis

import (
	"strconv"
	"strings"
	"sync"
)

// slot returns the slot of a key in a cluster: the CRC16 (XMODEM) of its hash tag, modulo 16384. The tag is the text
// between the first opening brace and the next closing brace. If there is none, or it is empty, the whole key counts.
// See https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/.
func slot(key string) uint16 {
	if _, after, ok := strings.Cut(key, "{"); ok {
		if tag, _, ok := strings.Cut(after, "}"); ok && tag != "" {
			key = tag
		}
	}
	crc := uint16(0)
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			crc = crc<<1 ^ crc>>15*0x1021
		}
	}
	return crc % slots
}

// slots is the number of slots of every cluster.
const slots = 16384

// tagOf returns a tag that puts a key into a slot: the smallest number above 0 whose text in base 36 has that slot. All
// processes find the same tag, as they must, because it is part of keys.
func tagOf(slot uint16) string { return strconv.FormatUint(uint64(tags()[slot]), 36) }

// tags returns the tags of all slots as numbers. The first call takes a few milliseconds to find them.
var tags = sync.OnceValue(func() *[slots]uint32 {
	var found [slots]uint32 // 0 means not found yet; "0" itself is no tag, its slot has a larger number
	for n, missing := uint32(1), slots; missing > 0; n++ {
		if at := &found[slot(strconv.FormatUint(uint64(n), 36))]; *at == 0 {
			*at = n
			missing--
		}
	}
	return &found
})
