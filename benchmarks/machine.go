package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
)

// machine describes the machine that this runs on.
func machine() string {
	text := fmt.Sprintf("%d processors", runtime.NumCPU())
	if model := find("/proc/cpuinfo", "model name"); model != "" {
		text += " (" + model + ")"
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) == nil {
		text += fmt.Sprintf(", %.0f GB of memory", float64(info.Totalram)*float64(info.Unit)/(1<<30))
	}
	if release, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		text += ", Linux " + strings.TrimSpace(string(release))
	}
	return text + ", " + runtime.Version()
}

// find returns what follows "key:" in a file.
func find(file, key string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// commit names the commit that is checked out.
func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--tags", "--dirty=, with changes that are not committed").Output()
	if err != nil {
		return "a commit that is not known"
	}
	return strings.TrimSpace(string(out))
}

// versions returns the versions of the modules that this program is built from.
func versions() map[string]string {
	out := map[string]string{}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			out[m.Path] = m.Version
		}
	}
	return out
}
