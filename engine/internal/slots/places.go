package slots

// places finds slots by their names: a hash table without buckets, in which a slot follows those that have the same
// place. Names are random, so they are their own hashes. Few slots are found without it.
type places struct {
	at   []int32 // a slot's index and 1; 0: none
	used int
}

// fewSlots is up to how many slots are looked at one by one.
const fewSlots = 8

// find returns the index of the slot with the name; none if there is none.
func (f *State) find(id uint64) int32 {
	if id == 0 {
		return none
	}
	if f.places.at == nil {
		for i := range f.slots {
			if f.slots[i].id == id {
				return int32(i)
			}
		}
		return none
	}
	if p := f.places.find(f.slots, id); f.places.at[p] != 0 {
		return f.places.at[p] - 1
	}
	return none
}

// find returns the place of the slot with the name, or the free place where it would be.
func (p *places) find(all []slot, id uint64) int {
	mask := len(p.at) - 1
	i := int(id) & mask
	for p.at[i] != 0 && all[p.at[i]-1].id != id {
		i = (i + 1) & mask
	}
	return i
}

// add adds a slot that has its name.
func (p *places) add(all []slot, i int32) {
	if len(all) <= fewSlots {
		return
	}
	if p.used++; 2*p.used > len(p.at) {
		p.grow(all)
		return
	}
	p.at[p.find(all, all[i].id)] = i + 1
}

// grow makes room, and adds all slots that are in use.
func (p *places) grow(all []slot) {
	size := 4 * fewSlots
	for size < 2*len(all) {
		size *= 2
	}
	p.at, p.used = make([]int32, size), 0
	for i := range all {
		if all[i].id != 0 {
			p.at[p.find(all, all[i].id)] = int32(i) + 1
			p.used++
		}
	}
}

// remove removes the slot with the name, and moves those behind it that would not be found any more.
func (p *places) remove(all []slot, id uint64) {
	if p.at == nil {
		return
	}
	mask := len(p.at) - 1
	hole := p.find(all, id)
	p.at[hole] = 0
	p.used--
	for i := (hole + 1) & mask; p.at[i] != 0; i = (i + 1) & mask {
		home := int(all[p.at[i]-1].id) & mask
		if (i-home)&mask >= (i-hole)&mask {
			p.at[hole], p.at[i] = p.at[i], 0
			hole = i
		}
	}
}
