package redisstore

import "testing"

// What is asked for while it is being done is done once more, however often it was asked for, and then may be asked for again.
func TestOnce(t *testing.T) {
	var s Store
	var of turn
	begun, end := make(chan struct{}), make(chan struct{})
	times := 0
	ask := func() {
		s.once(&of, func() {
			times++
			begun <- struct{}{}
			<-end
		})
	}
	for _, want := range []int{2, 4} {
		ask()
		<-begun
		ask()
		ask()
		end <- struct{}{}
		<-begun
		end <- struct{}{}
		s.goes.Wait()
		if times != want {
			t.Errorf("it was done %d times want %d", times, want)
		}
	}
}
