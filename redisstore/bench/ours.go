package main
import ("context";"io";"time"; "github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/redisstore/internal/redistest")
type ours struct{}
func openOurs(context.Context, *redistest.Server) (ours, error) { return ours{}, nil }
func (ours) close() error { return nil }
func (ours) rows() []*benchtable.Row { return nil }
func measureMemory(context.Context, io.Writer, *redistest.Server, int) error { return nil }
func measureLeases(context.Context, io.Writer, *redistest.Server, time.Duration) error { return nil }
