"""A compiled module, written by hand."""

MODULE = """HloModule made_by_hand, is_scheduled=true

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0}) tuple(%next, %z)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(LIMIT)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%put (cache: f32[100,16], row: f32[1,16], at: s32[]) -> f32[100,16] {
  %cache = f32[100,16]{1,0} parameter(0)
  %row = f32[1,16]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[100,16]{1,0} dynamic-update-slice(%cache, %row, %at, %zero)
}

ENTRY %main (x: f32[8,16], cache: f32[100,16], row: f32[1,16], at: s32[]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %cache = f32[100,16]{1,0} parameter(1)
  %row = f32[1,16]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %new = f32[100,16]{1,0} fusion(%cache, %row, %at), kind=kLoop, calls=%put
  %start = s32[] constant(2)
  %state = (s32[], f32[8,16]{1,0}) tuple(%start, %x)
  %loop = (s32[], f32[8,16]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %y = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
