// Answers what containerd's own filters package (Debian's packaged source) makes of a filter.
//
// Each line of stdin is a JSON object, and so is each line of stdout.
package main

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/containerd/filters"
	"github.com/sirupsen/logrus"
)

type question struct {
	Filters []string
	// A regular expression on its own: whether it is one
	Regexp *string
	Infos  []info
}

type info struct {
	Name, Parent, Kind string
	Labels             map[string]string
}

type answer struct {
	Error   string
	Matches []bool
}

// The fields of snapshots/storage/bolt.go adaptSnapshot, which is private.
func (i info) Field(path []string) (string, bool) {
	switch path[0] {
	case "name":
		return i.Name, true
	case "parent":
		return i.Parent, true
	case "kind":
		return i.Kind, true
	case "labels":
		value, found := i.Labels[strings.Join(path[1:], ".")]
		return value, found
	}
	return "", false
}

func ask(q question) answer {
	if q.Regexp != nil {
		if _, err := regexp.Compile(*q.Regexp); err != nil {
			return answer{Error: err.Error()}
		}
		return answer{}
	}
	filter, err := filters.ParseAll(q.Filters...)
	if err != nil {
		return answer{Error: err.Error()}
	}
	matches := []bool{}
	for _, i := range q.Infos {
		matches = append(matches, filter.Match(i))
	}
	return answer{Matches: matches}
}

func main() {
	logrus.SetOutput(io.Discard) // it logs each regular expression that is none
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 16<<20)
	out := json.NewEncoder(os.Stdout)
	for in.Scan() {
		var q question
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			panic(err)
		}
		if err := out.Encode(ask(q)); err != nil {
			panic(err)
		}
	}
}
