package agent

import (
	"testing"

	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/wire"
)

// One FlowEnd can name all slots of an answer. Other SDKs send no more than one.
func TestFlowEndTakesAllSlotsOfAnAnswer(t *testing.T) {
	if least := wire.MaxDecisions + bounds.MaxControlPoint + 8; maxEndSize < least {
		t.Errorf("a FlowEnd may have %d bytes want %d", maxEndSize, least)
	}
	if maxEndSize < wire.MaxEnd {
		t.Errorf("a FlowEnd may have %d bytes, and clients send up to %d", maxEndSize, wire.MaxEnd)
	}
	if maxSlots < wire.MostDecisions {
		t.Errorf("a FlowEnd may name %d slots want %d", maxSlots, wire.MostDecisions)
	}
}
