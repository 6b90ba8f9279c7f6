package flowctl

import "github.com/headgate-go/headgate/internal/flight"

// Runs is for package headgate, whose cached functions share runs with one client. It is nil for a nil client.
func (c *Client) Runs() *flight.Runs {
	if c == nil {
		return nil
	}
	return &c.runs
}

// unstored logs that the result of a cached function was not stored.
func (c *Client) unstored(controlPoint string, err error) {
	c.unstoredLog.warn(c.logger, "headgate: a result was not stored in the cache", "control_point", controlPoint, "error", err)
}
