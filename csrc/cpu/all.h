// Every kernel in the namespace ISA, and the table of them.
#include "conv_direct.h"
#include "conv_wgrad.h"
#include "maps.h"

#define NAME_(prefix, isa) prefix##isa
#define NAME(prefix, isa) NAME_(prefix, isa)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace unetpp {

const Kernels* NAME(kernels_, ISA)() {
  static const Kernels kernels = {TEXT(ISA),      LANES,          ISA::conv_winograd, ISA::conv_direct,
                                  ISA::conv_wgrad, ISA::pool,      ISA::pool_backward, ISA::head,
                                  ISA::head_backward, ISA::norm_sums, ISA::norm_apply,  ISA::act_backward};
  return &kernels;
}

}  // namespace unetpp
