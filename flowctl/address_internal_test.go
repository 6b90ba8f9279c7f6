package flowctl

import "testing"

func TestShownAddress(t *testing.T) {
	for target, want := range map[string]string{
		"":                             "",
		"agent:8089":                   "agent:8089",
		"[::1]:8089":                   "[::1]:8089",
		":8089":                        ":8089",
		"dns:///agent:8089":            "agent:8089",
		"dns://1.1.1.1/agent:8089":     "agent:8089",
		"dns:agent:8089":               "agent:8089",
		"dns:///agent":                 "agent",
		"passthrough:///agent:8089":    "agent:8089",
		"ipv4:1.2.3.4:80,1.2.3.5:80":   "1.2.3.4:80,1.2.3.5:80",
		"ipv6:[::1]:80":                "[::1]:80",
		"unix:///run/agent.sock":       "unix:/run/agent.sock",
		"unix:agent.sock":              "unix:agent.sock",
		"unix-abstract:agent":          "unix-abstract:agent",
		"dns:///user:secret@agent:80":  "",
		"vault:///secret":              "",
		"vault:secret":                 "",
		"xds:///agent":                 "",
		"passthrough:///a?key=secret":  "",
		"passthrough:///a/secret:8089": "",
	} {
		if got := shownAddress(target); got != want {
			t.Errorf("shownAddress(%q) = %q want %q", target, got, want)
		}
	}
}
